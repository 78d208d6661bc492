import hashlib
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from seekvl.corpus import nano as corpus
from seekvl.corpus.scene import COLOURS, Bounds, Drawn, Scene
from seekvl.corpus.shapes import SHAPES
from seekvl.corpus.signs import draw_sign
from seekvl.models.hybrid import Hybrid
from seekvl.models.siglip import Siglip
from seekvl.recipes import nano, nano_moe
from seekvl.recipes.nano_encoders import (
    ALPHABET,
    COLOUR_NAMES,
    FORMS,
    LABELS,
    NONE,
    Labeller,
    cell_accuracy,
    cell_batches,
    cell_labels,
    cell_loss,
)
from seekvl.recipes.nano_initialise import initialise
from seekvl.recipes.nano_views import Squares, Tiles, View


def shape(name: str, *, colour: str, box: tuple[float, float, float, float]) -> Drawn:
    return Drawn(kind="shape", name=f"{colour} {name}", colour=colour, shape=name, size="large", box=box)


def scene(*objects: Drawn, size: tuple[int, int] = (256, 256)) -> Scene:
    return Scene(image=Image.new("RGB", size), style="shapes", background="black", objects=objects)


def square(size: tuple[int, int]) -> View:
    return Squares(nano.IMAGE_CONFIG).view(size)


def test_labels_stand_where_the_object_stands() -> None:
    labels, boxes = cell_labels(
        scene(shape("circle", colour="red", box=(128, 0, 256, 62))), view=square((256, 256))
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
    labels, boxes = cell_labels(wide, view=square((256, 126)))
    grid = labels.view(10, 10, -1)
    rows = (grid[..., 0] > 0).any(1).nonzero().flatten().tolist()
    assert rows == [3, 4, 5, 6]  # 65 px of padding above, and the middle of row 2 lies at 64
    assert boxes.view(10, 10, 4)[4, 4].tolist() == [0, 0, 1, 1]


def test_a_small_object_is_not_lost_between_cell_middles() -> None:
    tiny = scene(shape("star", colour="blue", box=(2, 2, 8, 8)))
    labels, _ = cell_labels(tiny, view=square((256, 256)))
    assert labels[0, 0] == COLOUR_NAMES.index("blue") + 1


def test_letters_can_be_read_back_left_to_right() -> None:
    drawn = draw_sign(random.Random(4), word="ZEBRA")
    labels, _ = cell_labels(drawn, view=square(drawn.image.size))
    grid = labels.view(10, 10, -1)
    found = [
        (column, slot, ALPHABET[int(grid[row, column, 3 + slot]) - 1])
        for row in range(10)
        for column in range(10)
        for slot in range(2)
        if grid[row, column, 3 + slot] > 0
    ]
    assert "".join(letter for *_, letter in sorted(found)) == "ZEBRA"


@pytest.mark.parametrize(("text", "labels"), [("A", "A"), ("AB", "AB"), ("ABC", None), ("ABCD", None)])
def test_more_letters_than_a_cell_can_tell_apart_do_not_count(text: str, labels: str | None) -> None:
    letters = [
        Drawn(
            kind="letter", name=letter, colour="red", shape=letter, size="small",
            box=(4.0 * i, 4.0, 4.0 * i + 3, 9.0),
        )
        for i, letter in enumerate(text)
    ]  # fmt: skip
    cell = cell_labels(scene(*reversed(letters)), view=square((256, 256)))[0][0, 3:5].tolist()
    if labels is None:
        assert cell == [NONE, NONE]
    else:
        assert cell == [*(ALPHABET.index(letter) + 1 for letter in labels), 0][:2]


@pytest.fixture(scope="module")
def labeller() -> Labeller:
    torch.manual_seed(0)
    vision = Hybrid(nano.MODEL.vision)  # type: ignore[arg-type]
    initialise(vision, seed=0)
    return Labeller(vision)


def test_batches_depend_on_the_step_alone() -> None:
    batch = cell_batches(Squares(nano.IMAGE_CONFIG), batch_size=2, seed=0, draw=corpus.scene)
    assert torch.equal(batch(3).pixels, batch(3).pixels)
    assert torch.equal(batch(3).labels, batch(3).labels)
    assert not torch.equal(batch(3).pixels, batch(4).pixels)


def test_the_loss_learns_and_ignores_what_does_not_count(labeller: Labeller) -> None:
    batch = cell_batches(Squares(nano.IMAGE_CONFIG), batch_size=4, seed=0, draw=corpus.scene)(0)
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
    nothing = replace(batch, labels=empty, boxes=torch.zeros_like(batch.boxes))
    assert cell_loss(labeller, nothing).mean().isfinite()


def test_accuracy_counts_cells_that_hold_something(labeller: Labeller) -> None:
    batch = cell_batches(Squares(nano.IMAGE_CONFIG), batch_size=2, seed=0, draw=corpus.scene)(0)
    accuracy = cell_accuracy(labeller, batch)
    assert set(accuracy) == {*LABELS, "edge error"}
    assert all(0 <= value <= 1 for name in LABELS for value in accuracy[name])


def test_every_third_picture_of_a_batch_is_a_sign() -> None:
    labels = cell_batches(Squares(nano.IMAGE_CONFIG), batch_size=4, seed=3, draw=corpus.scene)(
        1
    ).labels  # pictures 4 to 7
    assert (labels[2, :, 1] == FORMS.index("sign") + 1).any() or (labels[2, :, 3] > 0).any()


def crowded() -> list[Scene]:
    """Scenes of every kind of object at odd places, drawn by nobody."""
    rng, scenes = random.Random(5), []
    for width, height in ((256, 256), (300, 180), (176, 336), (331, 217)):
        things = []
        for index in range(8):
            x, y = rng.uniform(0, width - 20), rng.uniform(0, height - 20)
            box = (x, y, rng.uniform(x + 4, width), rng.uniform(y + 4, height))
            kind = ("shape", "shape", "sign", "letter", "bar", "letter")[index % 6]
            named = {"shape": rng.choice(tuple(SHAPES)), "letter": rng.choice("ABCXYZ"), "bar": "x"}
            item = shape(named.get(kind, ""), colour=rng.choice(tuple(COLOURS)), box=box)
            things.append(replace(item, kind=kind))
        scenes.append(scene(*things, size=(width, height)))
    return scenes


def test_labels_of_squares_are_bit_for_bit_those_nano_was_trained_on() -> None:
    """The sums were taken before views came between scenes and labels."""
    seen = [cell_labels(one, view=square(one.image.size)) for one in crowded()]
    sums = [hashlib.sha256() for _ in range(2)]
    for pair in seen:
        for total, tensor in zip(sums, pair, strict=True):
            total.update(tensor.numpy().tobytes())
    assert [total.hexdigest()[:16] for total in sums] == ["4acbda89c9fb6f5c", "2253fb57a9525f12"]


TILES = Tiles(nano_moe.IMAGE_CONFIG, 10)


def on_tiles(*objects: Drawn, size: tuple[int, int], grid: tuple[int, int]) -> list[torch.Tensor]:
    """Return the labels of the whole and of each tile, i64[10, 10, labels]."""
    views = TILES.views(size, grid)
    return [cell_labels(scene(*objects, size=size), view=view)[0].view(10, 10, -1) for view in views]


def test_a_tile_is_labelled_with_what_it_shows() -> None:
    """A picture of 320 x 160 px fills two tiles, and half of the whole; the circle straddles both."""
    circle = shape("circle", colour="red", box=(128, 32, 224, 96))
    star = shape("star", colour="blue", box=(304, 128, 316, 140))
    whole, left, right = on_tiles(circle, star, size=(320, 160), grid=(2, 1))
    red, blue = (COLOUR_NAMES.index(name) + 1 for name in ("red", "blue"))
    assert cells(left, red) == {(r, c) for r in range(2, 6) for c in (8, 9)}
    assert cells(right, red) == {(r, c) for r in range(2, 6) for c in range(4)}
    assert cells(whole, red) == {(r, c) for r in (3, 4, 5) for c in (4, 5, 6)}  # 40 px of padding above
    assert cells(left, blue) == set()
    assert cells(right, blue) == {(8, 9)}
    assert [int(labels[..., 2].sum()) for labels in (whole, left, right)] == [2, 0, 2]
    assert right[4, 1, 2] == 1  # the middle of the circle, x 176, y 64
    assert left[3, 8, -4:].tolist() == [8, 2, 9, 6]  # 128 to the edge of 160, 32 to 96
    assert right[3, 1, -4:].tolist() == [0, 2, 4, 6]  # from the edge to 64
    assert whole[3, 5, -4:].tolist() == [4, 2, 7, 6]  # of the picture, as answers tell it


def cells(labels: torch.Tensor, colour: int) -> set[tuple[int, int]]:
    return {(row, column) for row, column in (labels[..., 0] == colour).nonzero().tolist()}


def test_letters_belong_to_the_tile_their_middle_lies_in() -> None:
    def letter(name: str, box: Bounds) -> Drawn:
        return replace(shape(name, colour="black", box=box), kind="letter")

    letters = (
        letter("Z", (4, 4, 12, 12)),
        letter("A", (4, 156, 12, 172)),  # its middle lies in the lower tile
        letter("B", (150, 300, 158, 312)),
    )
    labels = on_tiles(*letters, size=(160, 320), grid=(1, 2))
    assert [int((one[..., 3:5] > 0).sum()) for one in labels] == [3, 1, 2]
    assert labels[1][0, 0, 3] == ALPHABET.index("Z") + 1
    assert labels[2][0, 0, 3] == ALPHABET.index("A") + 1
    assert labels[2][9, 9, 3] == ALPHABET.index("B") + 1


def test_batches_of_tiles_hold_all_views_of_their_pictures() -> None:
    batch = cell_batches(TILES, batch_size=3, seed=0, draw=corpus.scene)(1)
    looks = [TILES(corpus.scene(0, i, style="sign" if i % 3 == 0 else None).image) for i in (3, 4, 5)]
    assert len(batch) == 3
    assert torch.equal(batch.pixels, torch.cat([pixels for pixels, _ in looks]))
    assert batch.labels.shape == (sum(len(views) for _, views in looks), 100, len(LABELS))
    assert batch.to(torch.device("meta")).pixels.device.type == "meta"


def test_one_tower_learns_from_tiles() -> None:
    torch.manual_seed(0)
    vision = Siglip(nano_moe.MODEL.vision)
    initialise(vision, seed=0)
    labeller = Labeller(vision)
    batch = cell_batches(TILES, batch_size=2, seed=0, draw=corpus.scene)(0)
    optimizer = torch.optim.AdamW(labeller.parameters(), lr=2e-3)
    losses = []
    for _ in range(4):
        loss = cell_loss(labeller, batch)
        assert loss.weight == 2
        losses.append(loss.mean().item())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(len(values) == 1 for values in cell_accuracy(labeller, batch).values())
