import random

import pytest
import torch
from PIL import Image

from seekvl.corpus.scene import Drawn, Scene
from seekvl.corpus.signs import draw_sign
from seekvl.models.hybrid import Hybrid
from seekvl.recipes import nano
from seekvl.recipes.nano_encoders import (
    ALPHABET,
    COLOUR_NAMES,
    FORMS,
    LABELS,
    NONE,
    CellBatch,
    Labeller,
    cell_accuracy,
    cell_batches,
    cell_labels,
    cell_loss,
)


def shape(name: str, *, colour: str, box: tuple[float, float, float, float]) -> Drawn:
    return Drawn(kind="shape", name=f"{colour} {name}", colour=colour, shape=name, size="large", box=box)


def scene(*objects: Drawn, size: tuple[int, int] = (256, 256)) -> Scene:
    return Scene(image=Image.new("RGB", size), style="shapes", background="black", objects=objects)


def test_labels_stand_where_the_object_stands() -> None:
    labels, boxes = cell_labels(
        scene(shape("circle", colour="red", box=(128, 0, 256, 62))), image=nano.IMAGE_CONFIG
    )
    grid = labels.view(10, 10, -1)
    assert {(r, c) for r, c in (grid[..., 0] > 0).nonzero().tolist()} == {
        (r, c) for r in (0, 1) for c in range(5, 10)
    }
    assert set(grid[:2, 5:, 0].flatten().tolist()) == {COLOUR_NAMES.index("red") + 1}
    assert set(grid[:2, 5:, 1].flatten().tolist()) == {FORMS.index("circle") + 1}
    assert grid[..., 2].sum() == 1
    assert grid[1, 7, 2] == 1
    assert grid[0, 6, -4:].tolist() == [5, 0, 9, 2]
    assert boxes.view(10, 10, 4)[0, 6].tolist() == pytest.approx([0.5, 0, 1, 62 / 256])
    assert set(grid[5, 5, -4:].tolist()) == {NONE}
    assert boxes.view(10, 10, 4)[5, 5].tolist() == [0, 0, 0, 0]


def test_padding_shifts_cells_but_not_the_coordinates_of_the_original() -> None:
    wide = scene(shape("circle", colour="red", box=(0, 0, 256, 126)), size=(256, 126))
    labels, boxes = cell_labels(wide, image=nano.IMAGE_CONFIG)
    grid = labels.view(10, 10, -1)
    rows = (grid[..., 0] > 0).any(1).nonzero().flatten().tolist()
    assert rows == [3, 4, 5, 6]  # 65 px of padding above, and the middle of row 2 lies at 64
    assert boxes.view(10, 10, 4)[4, 4].tolist() == [0, 0, 1, 1]


def test_a_small_object_is_not_lost_between_cell_middles() -> None:
    tiny = scene(shape("star", colour="blue", box=(2, 2, 8, 8)))
    labels, _ = cell_labels(tiny, image=nano.IMAGE_CONFIG)
    assert labels[0, 0] == COLOUR_NAMES.index("blue") + 1


def test_letters_can_be_read_back_left_to_right() -> None:
    drawn = draw_sign(random.Random(4), word="ZEBRA")
    labels, _ = cell_labels(drawn, image=nano.IMAGE_CONFIG)
    grid = labels.view(10, 10, -1)
    found = [
        (column, slot, ALPHABET[int(grid[row, column, 3 + slot]) - 1])
        for row in range(10)
        for column in range(10)
        for slot in range(2)
        if grid[row, column, 3 + slot] > 0
    ]
    assert "".join(letter for *_, letter in sorted(found)) == "ZEBRA"


@pytest.fixture(scope="module")
def labeller() -> Labeller:
    torch.manual_seed(0)
    vision = Hybrid(nano.MODEL.vision)  # type: ignore[arg-type]
    nano.initialise(vision, seed=0)
    return Labeller(vision)


def test_batches_depend_on_the_step_alone() -> None:
    batch = cell_batches(nano.IMAGE_CONFIG, batch_size=2, seed=0)
    assert torch.equal(batch(3).pixels, batch(3).pixels)
    assert torch.equal(batch(3).labels, batch(3).labels)
    assert not torch.equal(batch(3).pixels, batch(4).pixels)


def test_the_loss_learns_and_ignores_what_does_not_count(labeller: Labeller) -> None:
    batch = cell_batches(nano.IMAGE_CONFIG, batch_size=4, seed=0)(0)
    optimizer = torch.optim.AdamW(labeller.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        loss = cell_loss(labeller, batch)
        assert loss.weight == 4
        losses.append(loss.mean().item())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    empty = torch.zeros_like(batch.labels)
    empty[..., -4:] = NONE
    nothing = CellBatch(pixels=batch.pixels, labels=empty, boxes=torch.zeros_like(batch.boxes))
    assert cell_loss(labeller, nothing).mean().isfinite()


def test_accuracy_counts_cells_that_hold_something(labeller: Labeller) -> None:
    batch = cell_batches(nano.IMAGE_CONFIG, batch_size=2, seed=0)(0)
    accuracy = cell_accuracy(labeller, batch)
    assert set(accuracy) == {*LABELS, "edge error"}
    assert all(0 <= value <= 1 for name in LABELS for value in accuracy[name])


def test_every_third_picture_of_a_batch_is_a_sign() -> None:
    labels = cell_batches(nano.IMAGE_CONFIG, batch_size=4, seed=3)(1).labels  # pictures 4 to 7
    assert (labels[2, :, 1] == FORMS.index("sign") + 1).any() or (labels[2, :, 3] > 0).any()
