from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from seekvl.processing.choices import Preprocessing
from seekvl.processing.pad_image import ORIENTATION_TAG
from seekvl.processing.tile_image import (
    GRIDS_9,
    WHOLE,
    Grid,
    TileImageConfig,
    choose_grid,
    fitted_size,
    plan_grid,
    prepare_tiles,
    tile_count,
    visual_tokens,
)
from seekvl.runtime import SeekVLError

PUBLISHED = TileImageConfig(image_size=384, grids=GRIDS_9)
CONFIG = TileImageConfig(image_size=56, grids=GRIDS_9)
MODES: tuple[Preprocessing, ...] = ("seekvl", "official")


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def exact_grid(width: int, height: int, tile: int) -> Grid:
    """The rule of `choose_grid` in exact arithmetic, written out."""
    best, most, least = WHOLE, -1, 0
    for grid in GRIDS_9:
        across, down = grid[0] * tile, grid[1] * tile
        scale = min(Fraction(across, width), Fraction(down, height))
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = across * down - kept
        if kept > most or (kept == most and waste < least):
            best, most, least = grid, kept, waste
    return best


def test_candidates_are_all_grids_of_up_to_nine_tiles() -> None:
    assert len(GRIDS_9) == len(set(GRIDS_9)) == 23
    assert set(GRIDS_9) == {(c, r) for c in range(1, 10) for r in range(1, 10) if c * r <= 9}
    assert GRIDS_9[0] == WHOLE


@pytest.mark.parametrize(
    ("size", "grid", "tokens"),
    [
        ((64, 64), (1, 1), 421),
        ((384, 384), (1, 1), 421),
        ((385, 385), (2, 2), 1023),
        ((500, 300), (2, 1), 617),
        ((800, 600), (3, 2), 1415),
        ((1920, 1080), (4, 2), 1807),
        ((1080, 1920), (2, 4), 1835),
        ((2480, 3508), (3, 3), 2017),
        ((5014, 2004), (4, 2), 1807),
        ((3000, 400), (8, 1), 1793),
        ((10000, 500), (9, 1), 1989),
        ((50, 4000), (1, 9), 2101),
        ((1, 4000), (1, 1), 421),
    ],
)
def test_worked_examples(size: tuple[int, int], grid: Grid, tokens: int) -> None:
    assert choose_grid(*size, grids=GRIDS_9, tile=384) == grid
    assert visual_tokens(grid, PUBLISHED) == tokens


def test_the_order_of_floats_decides_few_sizes() -> None:
    """Nearly every choice is that of exact arithmetic; the golden tables hold sizes where it is not."""
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 3000, (300, 2)).tolist()
    same = [choose_grid(w, h, grids=GRIDS_9, tile=384) == exact_grid(w, h, 384) for w, h in sizes]
    assert sum(same) >= 270


def test_first_of_equals_wins() -> None:
    assert choose_grid(100, 100, grids=((2, 1), (1, 2)), tile=50) == (2, 1)
    assert choose_grid(100, 100, grids=((1, 2), (2, 1)), tile=50) == (1, 2)


def test_zero_size_is_refused() -> None:
    with pytest.raises(SeekVLError, match="0x5 px is zero-sized"):
        choose_grid(0, 5, grids=GRIDS_9, tile=384)


def test_tokens_of_every_grid_by_counting_rows() -> None:
    assert PUBLISHED.view_side == 14
    assert TileImageConfig(image_size=104, grids=GRIDS_9).view_side == 4
    for columns, rows in GRIDS_9:
        whole = ["feature"] * 14 + ["newline"]
        local = ["feature"] * (14 * columns) + ["newline"]
        slots = whole * 14 + ["separator"] + local * (14 * rows)
        assert visual_tokens((columns, rows), PUBLISHED) == len(slots)


def test_three_pictures_switch_tiling_off() -> None:
    size = (1920, 1080)
    assert [plan_grid(size, PUBLISHED, pictures=n) for n in (1, 2, 3)] == [(4, 2), (4, 2), (1, 1)]
    assert plan_grid(size, PUBLISHED, pictures=9, detail="high") == (4, 2)
    assert plan_grid(size, PUBLISHED, pictures=9, max_tiles=9) == (4, 2)
    assert plan_grid(size, PUBLISHED, pictures=1, detail="low") == (1, 1)
    assert plan_grid(size, PUBLISHED, pictures=9, detail="low", max_tiles=9) == (1, 1)
    assert plan_grid(size, PUBLISHED, pictures=9, detail="high", max_tiles=2) == (2, 1)


def test_max_tiles_bounds_the_grid() -> None:
    for bound in range(1, 12):
        columns, rows = plan_grid((2480, 3508), PUBLISHED, max_tiles=bound)
        assert columns * rows <= bound
    with pytest.raises(SeekVLError, match="max_tiles must be a whole number of at least 1, not 0"):
        plan_grid((10, 10), PUBLISHED, max_tiles=0)


def test_fitted_size_is_that_of_pillow() -> None:
    rng = np.random.default_rng(2)
    sizes = [*rng.integers(1, 300, (60, 2)).tolist(), [1, 999], [999, 1], [3, 5], [56, 56], [111, 112]]
    for width, height in sizes:
        for columns, rows in ((1, 1), (2, 1), (2, 3), (1, 9)):
            canvas = (56 * columns, 56 * rows)
            fitted = fitted_size((width, height), canvas)
            if min(fitted) > 0:
                assert fitted == ImageOps.contain(Image.new("L", (width, height)), canvas).size


@pytest.mark.parametrize("mode", MODES)
def test_tiles_are_cut_row_by_row_from_the_padded_canvas(mode: Preprocessing) -> None:
    image = noise(131, 47)
    prepared = prepare_tiles(image, CONFIG, grid=(3, 2), mode=mode)
    assert prepared.grid == (3, 2)
    assert prepared.size == (131, 47)
    assert prepared.pixels.shape == (7, 3, 56, 56)
    assert prepared.pixels.dtype == torch.float32
    boxes = [
        (56 * column, 56 * row, 56 * column + 56, 56 * row + 56) for row in (0, 1) for column in (0, 1, 2)
    ]
    canvas = ImageOps.pad(image, (168, 112), color=(127, 127, 127))
    views = [ImageOps.pad(image, (56, 56), color=(127, 127, 127)), *(canvas.crop(box) for box in boxes)]
    for pixels, view in zip(prepared.pixels, views, strict=True):
        values = torch.from_numpy(np.asarray(view).copy()).permute(2, 0, 1)
        assert torch.equal(pixels, (values.float() / 255 - 0.5) / 0.5)


def test_a_single_tile_is_made_once() -> None:
    assert (
        tile_count(WHOLE) == len(prepare_tiles(noise(9, 9), CONFIG, grid=WHOLE, mode="official").pixels) == 1
    )
    assert tile_count((2, 1)) == len(prepare_tiles(noise(9, 9), CONFIG, grid=(2, 1), mode="official").pixels)


def test_exif_orientation() -> None:
    image = noise(90, 30)
    image.getexif()[ORIENTATION_TAG] = 6
    assert prepare_tiles(image, CONFIG, grid=(1, 2), mode="seekvl").size == (30, 90)
    assert prepare_tiles(image, CONFIG, grid=(2, 1), mode="official").size == (90, 30)


def test_alpha_lies_on_the_pad_colour() -> None:
    image = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    clear = prepare_tiles(image, CONFIG, grid=(2, 1), mode="seekvl").pixels
    assert torch.all(clear == clear[0, 0, 0, 0])
    assert float(clear[0, 0, 0, 0]) == pytest.approx(-0.003922, abs=1e-6)
    assert float(prepare_tiles(image, CONFIG, grid=(2, 1), mode="official").pixels.min()) == -1


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)])
def test_a_picture_of_which_nothing_is_left(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    grid = choose_grid(*size, grids=GRIDS_9, tile=56)
    blank = prepare_tiles(image, CONFIG, grid=grid, mode="official").pixels
    assert torch.all(blank == blank[0, 0, 0, 0])
    with pytest.raises(SeekVLError, match=r"4000.* is too thin: scaled to fit .* cut it into shorter pieces"):
        prepare_tiles(image, CONFIG, grid=grid, mode="seekvl")


def test_a_blank_global_view_is_borne_where_the_tiles_show_the_picture() -> None:
    image = Image.new("RGB", (1, 400), "red")
    tiles = prepare_tiles(image, CONFIG, grid=(1, 8), mode="seekvl").pixels
    assert torch.all(tiles[0] == tiles[0, 0, 0, 0])
    assert float(tiles[1:, 0].max()) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "HSV"])
def test_modes_of_pillow(mode: str) -> None:
    for preprocessing in MODES:
        tiles = prepare_tiles(Image.new(mode, (70, 20)), CONFIG, grid=(2, 1), mode=preprocessing)
        assert tiles.pixels.shape == (3, 3, 56, 56)


def test_the_caller_s_picture_is_untouched() -> None:
    image = noise(60, 40, 4)
    before = image.tobytes()
    prepare_tiles(image, CONFIG, grid=(2, 1), mode="seekvl")
    assert image.tobytes() == before


def test_transformers_has_no_vl2() -> None:
    with pytest.raises(SeekVLError, match="transformers has no DeepSeek-VL2: use 'seekvl' or 'official'"):
        prepare_tiles(noise(9, 9), CONFIG, grid=WHOLE, mode="transformers")


def test_other_means_colour_the_padding() -> None:
    config = TileImageConfig(image_size=56, grids=GRIDS_9, mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3))
    assert config.pad_colour == (51, 102, 153)
    pixels = prepare_tiles(Image.new("RGB", (56, 28)), config, grid=WHOLE, mode="official").pixels
    assert torch.allclose(pixels[0, :, 0, 0], torch.zeros(3), atol=1e-6)
    assert torch.allclose(pixels[0, :, 28, 28], torch.tensor([-2.0, -2.0, -2.0]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image_size": 0}, "image_size must be a whole number"),
        ({"patch_size": 0}, "patch_size must be a whole number"),
        ({"patch_size": 400}, "patch_size 400 exceeds image_size 384"),
        ({"downsample": 0}, "downsample"),
        ({"grids": ()}, "grids must hold"),
        ({"grids": ((2, 1),)}, "grids must hold"),
        ({"grids": ((1, 1), (0, 1))}, "grids must hold"),
        ({"mean": (0.5, 0.5)}, "TileImageConfig.mean must be a tuple of 3"),
        ({"std": (0.5, 0.0, 0.5)}, "TileImageConfig.std must be above 0"),
        ({"max_tiled_pictures": -1}, "max_tiled_pictures must be at least 0"),
    ],
)
def test_bad_config(change: dict[str, object], expected: str) -> None:
    with pytest.raises(SeekVLError, match=expected):
        TileImageConfig(**{"image_size": 384, "grids": GRIDS_9, **change})
