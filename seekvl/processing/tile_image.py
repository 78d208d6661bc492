"""A picture of DeepSeek-VL2: one view of the whole, and tiles of a larger canvas (2412.10302, sec. 2).

    500 x 300 px, grid (2, 1):          +-------+     +-------+-------+
    three tiles, the global             |   0   |     |   1   |   2   |
    view first                          +-------+     +-------+-------+

Letters: k tiles of a picture, S side of a tile in px, g side of a tile in tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from seekvl.processing.choices import Preprocessing
from seekvl.processing.conversation import Detail
from seekvl.processing.pad_image import Colour, check_colour, look_up, to_rgb, upright
from seekvl.runtime import SeekVLError, is_whole

Grid: TypeAlias = tuple[int, int]
"""Columns and rows of local tiles."""

GRIDS_9: tuple[Grid, ...] = (
    *((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1)),
    *((2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3)),
)
"""The published candidates, up to 9 tiles, in the order of `candidate_resolutions`."""

WHOLE: Grid = (1, 1)
"""The grid of a picture that is looked at as a whole only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileImageConfig:
    """How a DeepSeek-VL2 checkpoint wants its pictures (`processor_config.json`).

    Raises SeekVLError for sizes below 1, deviations of 0, and grids without (1, 1).
    """

    image_size: int
    """Side S of a tile in px: 384 in all published checkpoints."""
    grids: tuple[Grid, ...]
    """Candidates, columns and rows; the first wins a tie."""
    patch_size: int = 14
    """Side of a patch of the vision tower in px."""
    downsample: int = 2
    """Patches along one side of what the adaptor makes one token."""
    mean: Colour = (0.5, 0.5, 0.5)
    """Mean per channel, for values in 0..1."""
    std: Colour = (0.5, 0.5, 0.5)
    """Standard deviation per channel, for values in 0..1."""
    max_tiled_pictures: int = 2
    """Most pictures of a conversation that are tiled; with more, each is a single tile."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "downsample"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SeekVLError(
                    f"TileImageConfig.{name} must be a whole number of at least 1, not {value!r}"
                )
        if self.patch_size > self.image_size:
            raise SeekVLError(
                f"TileImageConfig.patch_size {self.patch_size} exceeds image_size {self.image_size}"
            )
        if self.max_tiled_pictures < 0:
            raise SeekVLError(
                f"TileImageConfig.max_tiled_pictures must be at least 0, not {self.max_tiled_pictures}"
            )
        if WHOLE not in self.grids or any(min(grid) < 1 for grid in self.grids):
            raise SeekVLError(
                f"TileImageConfig.grids must hold (1, 1) and sides of at least 1, not {self.grids!r}"
            )
        for name in ("mean", "std"):
            check_colour(f"TileImageConfig.{name}", getattr(self, name))

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """The colour around and behind the picture, 0..255."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue

    @property
    def view_side(self) -> int:
        """Tokens g along one side of a tile: 14 in all published checkpoints."""
        return math.ceil(self.image_size // self.patch_size / self.downsample)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTiles:
    """One picture, ready for the vision tower."""

    pixels: Tensor
    """f32[k, 3, S, S], normalised: the global view, then the local tiles row by row."""
    grid: Grid
    """Columns and rows of the local tiles; (1, 1) has no tile of its own, the global view is the same."""
    size: tuple[int, int]
    """Width and height of the original in px, after the EXIF orientation where the mode applies it."""


def choose_grid(width: int, height: int, *, grids: Sequence[Grid], tile: int) -> Grid:
    """Pick the tile grid for a picture of this size in px, with tiles of this side in px.

    Most pixels kept wins, then least waste, then list order; enlarging a small picture gains nothing. The
    paper asks for the least padding (2412.10302, sec. 2); the published weights were made with this rule.
    The order of the floating-point operations matters: it decides some listed sizes.

    Raises SeekVLError for a side below 1 px.

    >>> choose_grid(500, 300, grids=GRIDS_9, tile=384)
    (2, 1)
    """
    if width < 1 or height < 1:
        raise SeekVLError(f"a picture of {width}x{height} px is zero-sized")

    def kept_and_spared(grid: Grid) -> tuple[int, int]:
        """Return the px of the picture that a canvas keeps, and those it wastes as a negative number."""
        across, down = grid[0] * tile, grid[1] * tile
        scale = min(across / width, down / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - across * down

    return max(grids, key=kept_and_spared)  # of equals, the first


def plan_grid(
    size: tuple[int, int],
    config: TileImageConfig,
    *,
    detail: Detail = "auto",
    pictures: int = 1,
    max_tiles: int | None = None,
) -> Grid:
    """Pick the grid of a picture of this width and height among so many `pictures` of a conversation.

    The checkpoints tile up to `max_tiled_pictures` pictures; with more, each is a single tile. `max_tiles`,
    a bound on columns x rows, takes the place of that switch for all pictures; detail "high" does for one.
    Detail "low" is a single tile.

    Raises SeekVLError for `max_tiles` below 1.

    >>> published = TileImageConfig(image_size=384, grids=GRIDS_9)
    >>> plan_grid((1920, 1080), published), plan_grid((1920, 1080), published, max_tiles=6)
    ((4, 2), (3, 2))
    >>> plan_grid((1920, 1080), published, pictures=3)
    (1, 1)
    """
    check_max_tiles(max_tiles)
    switched_off = detail == "auto" and max_tiles is None and pictures > config.max_tiled_pictures
    if detail == "low" or switched_off:
        return WHOLE
    grids = [grid for grid in config.grids if max_tiles is None or grid[0] * grid[1] <= max_tiles]
    return choose_grid(*size, grids=grids, tile=config.image_size)


def check_max_tiles(max_tiles: int | None) -> None:
    """Refuse a bound on tiles that leaves none."""
    if max_tiles is not None and (not is_whole(max_tiles) or max_tiles < 1):
        raise SeekVLError(f"max_tiles must be a whole number of at least 1, not {max_tiles!r}")


def tile_count(grid: Grid) -> int:
    """Count the tiles k of a picture; of a single local tile and the global view one is made, they are equal.

    >>> tile_count((1, 1)), tile_count((3, 2))
    (1, 7)
    """
    columns, rows = grid
    return 1 if grid == WHOLE else 1 + columns * rows


def visual_tokens(grid: Grid, config: TileImageConfig) -> int:
    """Count the slots a picture takes: its views, a newline after every row of each, one separator.

        g rows of g + 1    global view       | g = 14:  210
        1                  separator         |          1
        g rows x (g columns + 1)   local     |          14 rows x (14 columns + 1)

    >>> visual_tokens((1, 1), TileImageConfig(image_size=384, grids=GRIDS_9))
    421
    """
    (columns, rows), g = grid, config.view_side
    return g * (g + 1) + 1 + g * rows * (g * columns + 1)


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Compute width and height in px of a picture scaled to touch a canvas; both (width, height).

    The free side is rounded to the nearest, a half to even, and may come to 0.

    >>> fitted_size((500, 300), (768, 384))
    (640, 384)
    """
    (width, height), (across, down) = size, canvas
    if width / height > across / down:
        return across, round(height / width * across)
    if width / height < across / down:
        return round(width / height * down), down
    return canvas


def placed_box(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """Locate a picture of this size, scaled to fit, on its canvas: left, top, right, bottom in px.

    >>> placed_box((500, 300), (768, 384))
    (64, 0, 704, 384)
    """
    fitted = fitted_size(size, canvas)
    left, top = round((canvas[0] - fitted[0]) * 0.5), round((canvas[1] - fitted[1]) * 0.5)
    return left, top, left + fitted[0], top + fitted[1]


def check_tile_mode(mode: Preprocessing) -> None:
    """Refuse preprocessing "transformers", which has no DeepSeek-VL2."""
    if mode == "transformers":
        raise SeekVLError(
            "preprocessing 'transformers' is for DeepSeek-VL; transformers has no DeepSeek-VL2: use 'seekvl' "
            "or 'official'"
        )


def prepare_tiles(
    image: Image.Image, config: TileImageConfig, *, grid: Grid, mode: Preprocessing
) -> PreparedTiles:
    """Turn a decoded picture into the tiles the vision tower takes.

    "official" is the reference bit for bit: EXIF orientation ignored, alpha dropped, a picture so thin that
    nothing of it is left becomes blank. "seekvl" is the same with the orientation applied, transparent parts
    on the padding colour, and SeekVLError for a picture that would become blank.

    Raises SeekVLError for the mode "transformers".
    """
    check_tile_mode(mode)
    if mode == "seekvl":
        image = upright(image)
        _check_visible(image.size, config, grid=grid)
    size, side = image.size, config.image_size
    image = to_rgb(image, backdrop=config.pad_colour, mode=mode)
    views = np.asarray(_padded(image, config, grid=WHOLE))[None]  # 1 S S 3
    if grid != WHOLE:
        canvas = np.asarray(_padded(image, config, grid=grid))
        local = rearrange(canvas, "(r h) (c w) rgb -> (r c) h w rgb", h=side, w=side)
        views = np.concatenate([views, local])  # k S S 3
    pixels = np.empty((len(views), 3, side, side), dtype=np.float32)
    for view, out in zip(views, pixels, strict=True):
        look_up(view, _table(config.mean, config.std), out=out)
    return PreparedTiles(pixels=torch.from_numpy(pixels), grid=grid, size=size)


def _canvas(config: TileImageConfig, *, grid: Grid) -> tuple[int, int]:
    """Return width and height of a grid's canvas in px."""
    return grid[0] * config.image_size, grid[1] * config.image_size


def _check_visible(size: tuple[int, int], config: TileImageConfig, *, grid: Grid) -> None:
    """Refuse a picture of which nothing is left on its canvas."""
    canvas = _canvas(config, grid=grid)
    fitted = fitted_size(size, canvas)
    if min(fitted) < 1:
        raise SeekVLError(
            f"a picture of {size[0]}x{size[1]} px is too thin: scaled to fit {canvas[0]}x{canvas[1]} px it "
            f"is {fitted[0]}x{fitted[1]} px; cut it into shorter pieces"
        )


def _padded(image: Image.Image, config: TileImageConfig, *, grid: Grid) -> Image.Image:
    """Scale to fit the canvas of a grid (bicubic) and pad around the middle, as ImageOps.pad of Pillow."""
    canvas = _canvas(config, grid=grid)
    left, top, right, bottom = placed_box(image.size, canvas)
    fitted = right - left, bottom - top
    if fitted == canvas:
        return image.resize(canvas, Image.Resampling.BICUBIC)
    padded = Image.new("RGB", canvas, config.pad_colour)
    if min(fitted) > 0:
        padded.paste(image.resize(fitted, Image.Resampling.BICUBIC), (left, top))
    return padded


@lru_cache(maxsize=8)
def _table(mean: Colour, std: Colour) -> np.ndarray:
    """Compute f32[3, 256], all in float32: bytes over 255, then mean and deviation."""
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    return (values - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
