"""What a tower sees of a picture: one *view*, DeepSeek-VL's padded square, or several, DeepSeek-VL2's whole
and tiles.

Letters: n views, S side of a view in px.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from seekvl.corpus.scene import Bounds
from seekvl.processing.pad_image import PadImageConfig, content_box, prepare_picture
from seekvl.processing.tile_image import WHOLE, Grid, TileImageConfig, placed_box, plan_grid, prepare_tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One square that a tower sees of a picture: where the picture lies in it, perhaps reaching beyond."""

    cells: int
    """Cells g along one side."""
    cell: float
    """Side of a cell, px of the square."""
    left: float
    """Where the left edge of the picture lies, px of the square; below 0 in tiles further right."""
    top: float
    """Where its top edge lies, px of the square."""
    x_scale: float
    """Px of the square for one of the picture, across."""
    y_scale: float
    """Px of the square for one of the picture, down."""
    frame: Bounds
    """Part of the picture whose edges are 0 and 1 to the labels of edges, px of the picture."""

    def place(self, box: Bounds) -> Bounds:
        """Return a box of the picture in cells of the view."""
        x1, y1, x2, y2 = box
        return (
            (x1 * self.x_scale + self.left) / self.cell,
            (y1 * self.y_scale + self.top) / self.cell,
            (x2 * self.x_scale + self.left) / self.cell,
            (y2 * self.y_scale + self.top) / self.cell,
        )

    def middle(self, box: Bounds) -> tuple[int, int] | None:
        """Return row and column of the cell in which the middle of a box lies; None outside of the view."""
        x1, y1, x2, y2 = self.place(box)
        y, x = (y1 + y2) / 2, (x1 + x2) / 2
        return (int(y), int(x)) if 0 <= y < self.cells and 0 <= x < self.cells else None

    def edges(self, box: Bounds) -> Tensor:
        """Return f32[4], the edges of a box in 0..1 of the frame, beyond which nothing is seen."""
        left, top, right, bottom = self.frame
        sides = torch.tensor((right - left, bottom - top) * 2)
        return ((torch.tensor(box) - torch.tensor((left, top) * 2)) / sides).clamp(0, 1)


Look = Callable[[Image.Image], tuple[Tensor, Sequence[View]]]
"""From a picture to its views, f32[n, 3, S, S], and where each stands."""


@dataclass(frozen=True, slots=True)
class Squares:
    """Looks as DeepSeek-VL does: at the whole picture in one padded square, whose cells are its visual
    tokens.
    """

    image: PadImageConfig

    def __call__(self, picture: Image.Image) -> tuple[Tensor, Sequence[View]]:
        """Return the square f32[1, 3, S, S], its pixels in 0..1, as its only view."""
        return prepare_picture(picture, self.image, mode="seekvl").pixels[None], (self.view(picture.size),)

    def view(self, size: tuple[int, int]) -> View:
        """Return the view of a picture of this width and height in px."""
        (width, height), image = size, self.image
        left, top, right, bottom = content_box(width, height, image, mode="seekvl")
        return View(
            cells=image.patch_slots_side,
            cell=image.image_size / image.patch_slots_side,
            left=left,
            top=top,
            x_scale=(right - left) / width,
            y_scale=(bottom - top) / height,
            frame=(0.0, 0.0, float(width), float(height)),
        )


@dataclass(frozen=True, slots=True)
class Tiles:
    """Looks as DeepSeek-VL2 does: at the whole picture, and at its tiles."""

    image: TileImageConfig
    cells: int
    """Cells along one side of a tile: patches of the tower, or features that the adaptor makes of them."""

    def __call__(self, picture: Image.Image) -> tuple[Tensor, Sequence[View]]:
        """Return the whole and the tiles row by row, f32[n, 3, S, S], normalised."""
        grid = plan_grid(picture.size, self.image)
        return prepare_tiles(picture, self.image, grid=grid, mode="seekvl").pixels, self.views(
            picture.size, grid
        )

    def views(self, size: tuple[int, int], grid: Grid) -> tuple[View, ...]:
        """Return the views of a picture of this width and height in px, cut into this grid.

        The frame of the whole is the picture; that of a tile is what the tile shows, so that no label asks
        for what a tower cannot see.
        """
        width, height = map(float, size)
        whole = replace(self._tile(size, WHOLE, column=0, row=0), frame=(0.0, 0.0, width, height))
        if grid == WHOLE:
            return (whole,)
        columns, rows = grid
        places = [(column, row) for row in range(rows) for column in range(columns)]
        return (whole, *(self._tile(size, grid, column=column, row=row) for column, row in places))

    def _tile(self, size: tuple[int, int], grid: Grid, *, column: int, row: int) -> View:
        """Return the view of one tile of a canvas."""
        side = self.image.image_size
        left, top, right, bottom = placed_box(size, (grid[0] * side, grid[1] * side))
        x_scale, y_scale = (right - left) / size[0], (bottom - top) / size[1]
        left, top = left - column * side, top - row * side
        return View(
            cells=self.cells,
            cell=side / self.cells,
            left=left,
            top=top,
            x_scale=x_scale,
            y_scale=y_scale,
            frame=(-left / x_scale, -top / y_scale, (side - left) / x_scale, (side - top) / y_scale),
        )
