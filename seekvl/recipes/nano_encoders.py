"""Warm-up of vision towers: name what lies under every feature of their grid.

DeepSeek-VL starts from a SAM pretrained on masks and a SigLIP pretrained on captions (2403.05525, sec. 3.1).
The small models have no such past. Their drawn pictures know what stands where, so each tower learns to label
its own grid, with a linear layer that is thrown away afterwards.

Letters: n views of all pictures, S side of a view in px, g cells along a side of it, t = g*g cells, k classes
of a label.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.corpus.scene import COLOURS, Bounds, Scene
from seekvl.corpus.shapes import SHAPES
from seekvl.models.hybrid import Hybrid
from seekvl.models.siglip import Siglip
from seekvl.recipes.nano_views import Look, View
from seekvl.train.objective import Loss

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOUR_NAMES = tuple(COLOURS)
FORMS = (*SHAPES, "bar", "sign")
LETTERS_A_CELL = 2
"""Letters whose middles may share a cell and are still told apart, left to right; where there are more, the
letters of the cell do not count.
"""
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
frame of the view.
"""

READ = sum(LABELS.values()) + len(EDGES)
"""Numbers read off a feature: the logits of all labels, and the edges."""

WEIGHTS = (1.0, 2.0, 1.0, 2.0, 2.0, 0.25, 0.25, 0.25, 0.25)
"""What each label counts in the loss: forms and letters are learnt last and needed most."""

BOX_WEIGHT = 8.0
"""What the mean absolute error of the edges counts, in shares of the frame."""


class DrawScene(Protocol):
    """What draws scenes, a pure function of seed and index, such as `corpus.nano.scene`."""

    def __call__(self, seed: int, index: int, *, style: str | None) -> Scene:
        """Draw the scene of a seed and index, of one style or, for None, of any."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CellBatch:
    """The views of some pictures and what lies under each of their cells."""

    pictures: int
    """How many pictures there are."""
    pixels: Tensor
    """f32[n, 3, S, S], the views of the first picture, then those of the second and so on."""
    labels: Tensor
    """i64[n, t, len(LABELS)]."""
    boxes: Tensor
    """f32[n, t, 4]: edges of the object under the cell, 0..1 of the view's frame; 0 where nothing is."""

    def __len__(self) -> int:
        """Count the pictures."""
        return self.pictures

    def to(self, device: torch.device) -> "CellBatch":
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "CellBatch":
        """Return the batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> "CellBatch":
        return CellBatch(
            pictures=self.pictures,
            pixels=move(self.pixels),
            labels=move(self.labels),
            boxes=move(self.boxes),
        )


class Labeller(nn.Module):
    """One tower or both, each with a linear layer that reads the labels off its features."""

    def __init__(self, vision: Hybrid | Siglip) -> None:
        super().__init__()
        self.vision = vision
        if isinstance(vision, Hybrid):
            self.read_high = nn.Linear(vision.config.low.width, READ)
            self.read_low = nn.Linear(vision.config.low.width, READ)
        else:
            self.read = nn.Linear(vision.config.width, READ)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return what each tower reads, the high one first, f[n, t, sum of k + 4]: label logits, then edges.

        Pixels are in 0..1; those of a tower that has no mean to subtract are normalised.
        """
        if isinstance(self.vision, Hybrid):
            high, low = self.vision(pixels)
            return self.read_high(high), self.read_low(low)
        return (self.read(self.vision(pixels, normalized=self.vision.config.pixel_mean is None)),)


def cell_labels(scene: Scene, *, view: View) -> tuple[Tensor, Tensor]:
    """Return labels i64[t, len(LABELS)] and boxes f32[t, 4] of a scene on the cells of a view."""
    g = view.cells
    labels = torch.zeros(g, g, len(LABELS), dtype=torch.int64)
    labels[..., -len(EDGES) :] = NONE
    boxes = torch.zeros(g, g, len(EDGES))
    objects = [item for item in scene.objects if item.kind not in ("letter", "text")]
    for item in sorted(objects, key=lambda item: item.kind != "sign"):  # what stands on a sign hides it
        inside, middle = _under(view, item.box), view.middle(item.box)
        edges = view.edges(item.box)
        labels[inside, 0] = COLOUR_NAMES.index(item.colour) + 1
        labels[inside, 1] = FORMS.index(item.shape if item.kind == "shape" else item.kind) + 1
        boxes[inside] = edges
        labels[inside, -len(EDGES) :] = (edges * 10).long().clamp(0, 9)
        if middle is not None:
            labels[(*middle, 2)] = (labels[(*middle, 2)] + 1).clamp(max=2)
    for middle, letters in _letters(scene, view=view).items():
        if len(letters) > LETTERS_A_CELL:
            labels[middle][3 : 3 + LETTERS_A_CELL] = NONE  # no tower can tell so many apart
            continue
        for slot, letter in enumerate(letters):
            labels[(*middle, 3 + slot)] = ALPHABET.index(letter) + 1
    return labels.flatten(0, 1), boxes.flatten(0, 1)


def _letters(scene: Scene, *, view: View) -> dict[tuple[int, int], list[str]]:
    """Return the letters whose middle lies in each cell, by row and column, from left to right."""
    found: dict[tuple[int, int], list[str]] = {}
    letters = (item for item in scene.objects if item.kind == "letter")
    for item in sorted(letters, key=lambda item: item.box[0]):
        middle = view.middle(item.box)
        if middle is not None:
            found.setdefault(middle, []).append(item.shape)
    return found


def _under(view: View, box: Bounds) -> Tensor:
    """Tell bool[g, g] which cells have their middle in a box; the cell of its own middle always counts."""
    x1, y1, x2, y2 = view.place(box)
    middles = torch.arange(view.cells) + 0.5
    inside = ((middles >= y1) & (middles <= y2))[:, None] & ((middles >= x1) & (middles <= x2))[None, :]
    middle = view.middle(box)
    if middle is not None:
        inside[middle] = True
    return inside


def cell_loss(model: Labeller, batch: CellBatch) -> Loss:
    """Return the mean loss of the towers over a batch, counted in pictures.

    A label's loss is its mean where something lies plus half its mean where nothing does: most cells are
    empty.
    """
    occupied = batch.labels[..., -1] != NONE
    losses = []
    reads = model(batch.pixels)
    for read in reads:
        *parts, edges = read.float().split([*LABELS.values(), len(EDGES)], dim=-1)
        for index, (part, weight) in enumerate(zip(parts, WEIGHTS, strict=True)):
            target = batch.labels[..., index]
            each = F.cross_entropy(part.transpose(1, 2), target, ignore_index=NONE, reduction="none")  # n t
            something = _counted(target, index)
            losses.append(weight * (_mean(each, something) + 0.5 * _mean(each, (target == 0) & ~something)))
        losses.append(BOX_WEIGHT * _mean((edges - batch.boxes).abs().mean(-1), occupied))
    count = torch.tensor(float(len(batch)), device=batch.pixels.device)
    return Loss(total=torch.stack(losses).sum() * count / len(reads), weight=count)


@torch.inference_mode()
def cell_accuracy(model: Labeller, batch: CellBatch) -> dict[str, tuple[float, ...]]:
    """Return how well each tower, the high one first, labels non-empty cells: share named rightly, and the
    mean error of edges.
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
    return {name: tuple(values) for name, values in found.items()}


def cell_batches(look: Look, *, batch_size: int, seed: int, draw: DrawScene) -> Callable[[int], CellBatch]:
    """Return the batch of a step as a function of its number; every third picture is a sign, for letters are
    learnt last.
    """

    def batch(step: int) -> CellBatch:
        """Draw the batch of a step."""
        indices = range(step * batch_size, (step + 1) * batch_size)
        scenes = [draw(seed, index, style="sign" if index % 3 == 0 else None) for index in indices]
        looks = [look(scene.image) for scene in scenes]
        seen = [
            cell_labels(scene, view=view)
            for scene, (_, views) in zip(scenes, looks, strict=True)
            for view in views
        ]
        labels, boxes = zip(*seen, strict=True)
        return CellBatch(
            pictures=batch_size,
            pixels=torch.cat([pixels for pixels, _ in looks]),
            labels=torch.stack(labels),
            boxes=torch.stack(boxes),
        )

    return batch


def _counted(target: Tensor, index: int) -> Tensor:
    """Tell in which cells i64[n, t] label `index` says something."""
    return target != NONE if index >= len(LABELS) - len(EDGES) else target > 0


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)
