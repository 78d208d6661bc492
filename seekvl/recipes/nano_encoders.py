"""Warm-up of seekvl-nano's two vision towers: name what lies under every feature of the grid.

DeepSeek-VL starts from a SAM pretrained on masks and a SigLIP pretrained on captions (2403.05525, sec. 3.1).
Nano has no such past. Its drawn pictures know what stands where, so each tower learns to label its own grid,
with a linear layer that is thrown away afterwards.

Letters: n pictures, g grid side, t = g*g cells, k classes of a label.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.corpus import nano as corpus
from seekvl.corpus.scene import COLOURS, Drawn, Scene
from seekvl.corpus.shapes import SHAPES
from seekvl.models.hybrid import Hybrid
from seekvl.processing.pad_image import PadImageConfig, content_box, prepare_picture
from seekvl.train.objective import Loss

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOUR_NAMES = tuple(COLOURS)
FORMS = (*SHAPES, "bar", "sign")
LETTERS_A_CELL = 2
"""Letters whose centres may share a cell and are still told apart, left to right."""
NONE = -100
"""A label that does not count."""

EDGES = ("x1", "y1", "x2", "y2")
LABELS = {
    "colour": len(COLOUR_NAMES) + 1,
    "form": len(FORMS) + 1,
    "centres": 3,
    **{f"letter {slot}": len(ALPHABET) + 1 for slot in range(LETTERS_A_CELL)},
    **{f"tenth of {edge}": 10 for edge in EDGES},
}
"""Labels of a cell and their classes k. Class 0 of the first ones means nothing is there; `centres` counts
objects whose middle lies in the cell; the tenths say roughly where the object under it has its edges in the
original picture.
"""

WEIGHTS = (1.0, 2.0, 1.0, 2.0, 2.0, 0.25, 0.25, 0.25, 0.25)
"""What each label counts in the loss: forms and letters are learnt last and needed most."""

BOX_WEIGHT = 8.0
"""What the mean absolute error of the edges counts, in shares of the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellBatch:
    """Pictures and what lies under each of their cells."""

    pixels: Tensor
    """f32[n, 3, S, S] in 0..1."""
    labels: Tensor
    """i64[n, t, len(LABELS)]."""
    boxes: Tensor
    """f32[n, t, 4]: edges of the object under the cell, 0..1 of the original picture; 0 where nothing is."""

    def __len__(self) -> int:
        """Count the pictures."""
        return self.pixels.shape[0]

    def to(self, device: torch.device) -> "CellBatch":
        """Return the batch on a device."""
        return CellBatch(
            pixels=self.pixels.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            boxes=self.boxes.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "CellBatch":
        """Return the batch in page-locked memory."""
        return CellBatch(
            pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory(), boxes=self.boxes.pin_memory()
        )


class Labeller(nn.Module):
    """Both towers, each with a linear layer that reads the labels off its features."""

    def __init__(self, vision: Hybrid) -> None:
        super().__init__()
        self.vision = vision
        width = vision.config.low.width
        self.read_high = nn.Linear(width, sum(LABELS.values()) + len(EDGES))
        self.read_low = nn.Linear(width, sum(LABELS.values()) + len(EDGES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the high and the low tower read, f[n, t, sum of k + 4]: label logits, then edges."""
        high, low = self.vision(pixels)
        return self.read_high(high), self.read_low(low)


def cell_labels(scene: Scene, *, image: PadImageConfig) -> tuple[Tensor, Tensor]:
    """Return labels i64[t, len(LABELS)] and boxes f32[t, 4] of a scene on the grid of its padded picture."""
    g = image.patch_slots_side
    left, top, right, bottom = content_box(*scene.image.size, image, mode="seekvl")
    x_scale, y_scale = (right - left) / scene.image.width, (bottom - top) / scene.image.height
    cell = image.image_size / g

    def place(item: Drawn) -> tuple[float, float, float, float]:
        """Box of an item in cells."""
        x1, y1, x2, y2 = item.box
        return (
            (x1 * x_scale + left) / cell,
            (y1 * y_scale + top) / cell,
            (x2 * x_scale + left) / cell,
            (y2 * y_scale + top) / cell,
        )

    labels = torch.zeros(g, g, len(LABELS), dtype=torch.int64)
    labels[..., -len(EDGES) :] = NONE
    boxes = torch.zeros(g, g, len(EDGES))
    sides = torch.tensor(scene.image.size * 2)
    objects = [item for item in scene.objects if item.kind not in ("letter", "text")]
    for item in sorted(objects, key=lambda item: item.kind != "sign"):  # what stands on a sign hides it
        x1, y1, x2, y2 = place(item)
        row, column = _cell((y1 + y2) / 2, g), _cell((x1 + x2) / 2, g)
        middle = torch.arange(g) + 0.5
        inside = ((middle >= y1) & (middle <= y2))[:, None] & ((middle >= x1) & (middle <= x2))[None, :]
        inside[row, column] = True
        form = FORMS.index(item.shape if item.kind == "shape" else item.kind) + 1
        labels[inside, 0] = COLOUR_NAMES.index(item.colour) + 1
        labels[inside, 1] = form
        edges = torch.tensor(item.box) / sides
        boxes[inside] = edges
        labels[inside, -len(EDGES) :] = (edges * 10).long().clamp(0, 9)
        labels[row, column, 2] = (labels[row, column, 2] + 1).clamp(max=2)
    letters = sorted((item for item in scene.objects if item.kind == "letter"), key=lambda item: item.box[0])
    for item in letters:
        x1, y1, x2, y2 = place(item)
        slots = labels[_cell((y1 + y2) / 2, g), _cell((x1 + x2) / 2, g), 3 : 3 + LETTERS_A_CELL]
        slots[int(slots[0] > 0)] = ALPHABET.index(item.shape) + 1
    return labels.flatten(0, 1), boxes.flatten(0, 1)


def cell_loss(model: Labeller, batch: CellBatch) -> Loss:
    """Return the loss of both towers over a batch, counted in pictures.

    A label's loss is its mean where something lies plus half its mean where nothing does: most cells are
    empty.
    """
    occupied = batch.labels[..., -1] != NONE
    losses = []
    for read in model(batch.pixels):
        *parts, edges = read.float().split([*LABELS.values(), len(EDGES)], dim=-1)
        for index, (part, weight) in enumerate(zip(parts, WEIGHTS, strict=True)):
            target = batch.labels[..., index]
            each = F.cross_entropy(part.transpose(1, 2), target, ignore_index=NONE, reduction="none")  # n t
            something = _counted(target, index)
            losses.append(weight * (_mean(each, something) + 0.5 * _mean(each, (target == 0) & ~something)))
        losses.append(BOX_WEIGHT * _mean((edges - batch.boxes).abs().mean(-1), occupied))
    count = torch.tensor(float(len(batch)), device=batch.pixels.device)
    return Loss(total=torch.stack(losses).sum() * count / 2, weight=count)


@torch.inference_mode()
def cell_accuracy(model: Labeller, batch: CellBatch) -> dict[str, tuple[float, float]]:
    """Return how well the (high, low) tower labels non-empty cells: share named rightly, and the mean error
    of edges.
    """
    occupied = batch.labels[..., -1] != NONE
    found: dict[str, list[float]] = {name: [] for name in (*LABELS, "edge error")}
    for read in model(batch.pixels):
        *parts, edges = read.split([*LABELS.values(), len(EDGES)], dim=-1)
        for index, (name, part) in enumerate(zip(LABELS, parts, strict=True)):
            target = batch.labels[..., index]
            right = (part.argmax(-1) == target).float()
            found[name].append(_mean(right, _counted(target, index)).item())
        found["edge error"].append(_mean((edges - batch.boxes).abs().mean(-1), occupied).item())
    return {name: (high, low) for name, (high, low) in found.items()}


def cell_batches(image: PadImageConfig, *, batch_size: int, seed: int) -> Callable[[int], CellBatch]:
    """Return the batch of a step as a function of its number; every third picture is a sign, for letters are
    learnt last.
    """

    def batch(step: int) -> CellBatch:
        """Draw the batch of a step."""
        indices = range(step * batch_size, (step + 1) * batch_size)
        scenes = [corpus.scene(seed, index, style="sign" if index % 3 == 0 else None) for index in indices]
        pictures = [prepare_picture(scene.image, image, mode="seekvl").pixels for scene in scenes]
        labels, boxes = zip(*(cell_labels(scene, image=image) for scene in scenes), strict=True)
        return CellBatch(pixels=torch.stack(pictures), labels=torch.stack(labels), boxes=torch.stack(boxes))

    return batch


def _cell(place: float, grid: int) -> int:
    return min(grid - 1, max(0, int(place)))


def _counted(target: Tensor, index: int) -> Tensor:
    """Tell in which cells i64[n, t] label `index` says something."""
    return target != NONE if index >= len(LABELS) - len(EDGES) else target > 0


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)
