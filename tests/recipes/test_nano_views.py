import numpy as np
import pytest
import torch
from PIL import Image

from seekvl.processing.tile_image import plan_grid, tile_count
from seekvl.recipes import nano, nano_moe
from seekvl.recipes.nano_views import Squares, Tiles, View

SIDE = 160


def spot(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Draw a white box on black."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = 255
    return Image.fromarray(pixels)


def found(pixels: torch.Tensor, view: View) -> tuple[float, float, float, float]:
    """Return the box of the brightest pixels of a view, in cells."""
    rows, columns = (pixels[0] > pixels.max() - 0.4).nonzero(as_tuple=True)
    edges = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)) / view.cell
    x1, y1, x2, y2 = edges.tolist()
    return x1, y1, x2, y2


@pytest.mark.parametrize("size", [(320, 160), (300, 200), (170, 330), (330, 330), (120, 90), (900, 150)])
def test_views_say_where_pixels_land(size: tuple[int, int]) -> None:
    """A box within each tile is found in its pixels where the view places it, to half a pixel or so."""
    look = Tiles(nano_moe.IMAGE_CONFIG, 10)
    grid = plan_grid(size, nano_moe.IMAGE_CONFIG)
    views = look.views(size, grid)
    assert len(views) == tile_count(grid)
    for number, view in enumerate(views):
        x1, y1, x2, y2 = view.frame
        inner = (max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1]))
        box = (
            round(inner[0] + 0.25 * (inner[2] - inner[0])),
            round(inner[1] + 0.25 * (inner[3] - inner[1])),
            round(inner[0] + 0.75 * (inner[2] - inner[0])),
            round(inner[1] + 0.75 * (inner[3] - inner[1])),
        )
        pixels, again = look(spot(size, box))
        assert tuple(again) == views
        assert found(pixels[number], view) == pytest.approx(view.place(box), abs=0.1)


def test_a_square_says_where_pixels_land() -> None:
    look = Squares(nano.IMAGE_CONFIG)
    pixels, (view,) = look(spot((300, 150), (60, 40, 200, 110)))
    assert found(pixels[0], view) == pytest.approx(view.place((60, 40, 200, 110)), abs=0.05)
    assert view.frame == (0, 0, 300, 150)


def test_edges_are_told_of_what_a_view_can_see() -> None:
    whole, left, right = Tiles(nano_moe.IMAGE_CONFIG, 5).views((320, 160), (2, 1))
    box = (80, 40, 240, 120)
    assert whole.edges(box).tolist() == [0.25, 0.25, 0.75, 0.75]
    assert left.edges(box).tolist() == [0.5, 0.25, 1.0, 0.75]
    assert right.edges(box).tolist() == [0.0, 0.25, 0.5, 0.75]
    assert (left.middle(box), right.middle(box), whole.middle(box)) == (None, (2, 0), (2, 2))


def test_pixels_come_as_the_towers_take_them() -> None:
    picture = Image.new("RGB", (200, 160), (255, 255, 255))
    padded, _ = Squares(nano.IMAGE_CONFIG)(picture)
    tiles, _ = Tiles(nano_moe.IMAGE_CONFIG, 10)(picture)
    assert padded.shape == (1, 3, 256, 256)
    assert 0 <= padded.min() < padded.max() == 1
    assert tiles.shape[1:] == (3, SIDE, SIDE)
    assert tiles.max() == 1
    assert tiles.min() == pytest.approx(-1 / 255, abs=1e-6)  # padding of 127 after (x - 0.5) / 0.5
