"""Pictures of one to six plain shapes."""

import math
import random
from functools import cache
from typing import Literal

from PIL import Image, ImageDraw

from seekvl.corpus.scene import Bounds, Canvas, Drawn, Rgb, Scene, canvas_size

Size = Literal["small", "medium", "large"]

SHAPES: dict[str, int] = {
    "circle": 0,
    "square": 7,
    "triangle": 180,
    "star": 36,
    "heart": 18,
    "cross": 10,
    "diamond": 7,
    "ring": 0,
}
"""Shapes, and by how many degrees each may be turned either way and still be called so."""

SIZES: dict[Size, tuple[float, float]] = {
    "small": (0.13, 0.175),
    "medium": (0.21, 0.26),
    "large": (0.31, 0.40),
}
"""Extent of each size as a share of the picture's longer side; the gaps keep the words true."""

LEAST_VISIBLE = 0.65
"""Share of a shape that later shapes must leave to see."""
MOST = 6
FINE = 3
"""Masks are drawn this many times larger and averaged down, for smooth edges."""


def draw_shapes(
    rng: random.Random, *, count: int | None = None, alike: int = 0, by: Literal["shape", "colour"] = "shape"
) -> Scene:
    """Draw a picture of `count` shapes (1 to 6 when None), the first `alike` of them of one shape or colour.

    No two shapes touch in four pictures of five; in the fifth, one may hide up to a third of one of another
    colour. A shape that finds no room is tried smaller, at last left out: the objects say what is there.
    """
    canvas = Canvas(rng, *canvas_size(rng))
    wanted = count or rng.choices(range(1, MOST + 1), weights=(3, 3, 4, 4, 4, 3))[0]
    palette = canvas.clear_colours(rng)
    plan = [[rng.choice(tuple(SHAPES)), rng.choice(tuple(palette))] for _ in range(wanted)]
    column = 0 if by == "shape" else 1
    for row in plan[1:alike]:
        row[column] = plan[0][column]
    if (
        not alike and wanted > 1 and rng.random() < 0.45
    ):  # repeats, so that counts of one kind are not always 1
        column = rng.randrange(2)
        for row in plan[1 : rng.randint(2, wanted)]:
            row[column] = plan[0][column]
    placed = place_shapes(rng, canvas, plan=plan, palette=palette, overlap=rng.random() < 0.2)
    return Scene(image=canvas.grain(rng), style="shapes", background=canvas.background, objects=placed)


def place_shapes(
    rng: random.Random,
    canvas: Canvas,
    *,
    plan: list[list[str]],
    palette: dict[str, Rgb],
    overlap: bool = False,
    taken: tuple[Bounds, ...] = (),
) -> tuple[Drawn, ...]:
    """Put shapes, each a pair of shape and colour, on a canvas beside what is there, and describe them."""
    boxes: list[Bounds] = list(taken)
    colours: list[str | None] = [None] * len(taken)
    kept: list[tuple[int, str, str, Size]] = []
    for shape, colour in plan:
        for size in _sizes(rng, len(plan)):
            owner = _place(
                rng, canvas, shape=shape, size=size, rgb=palette[colour], colour=colour, boxes=boxes,
                colours=colours, overlap=overlap,
            )  # fmt: skip
            if owner:
                kept.append((owner, shape, colour, size))
                break
    return tuple(
        Drawn(
            kind="shape",
            name=f"{colour} {shape}",
            colour=colour,
            shape=shape,
            size=size,
            box=canvas.box(owner),
        )
        for owner, shape, colour, size in kept
    )


def _sizes(rng: random.Random, count: int) -> list[Size]:
    """List the size to try first, then smaller ones; crowds are of smaller shapes."""
    order: list[Size] = ["large", "medium", "small"]
    first = rng.choices(range(3), weights=(4, 3, 3) if count <= 3 else (2, 3, 4))[0]
    return order[first:]


def _place(
    rng: random.Random,
    canvas: Canvas,
    *,
    shape: str,
    size: Size,
    rgb: Rgb,
    colour: str,
    boxes: list[Bounds],
    colours: list[str | None],
    overlap: bool,
) -> int:
    """Try a few spots for one shape and paste it at the first that is free; 0 when none is."""
    extent = rng.uniform(*SIZES[size]) * canvas.longer
    turn = rng.uniform(-SHAPES[shape], SHAPES[shape])
    mask = shape_mask(shape, extent, turn=turn)
    gap = 0.02 * canvas.longer
    if mask.width + 2 > canvas.width or mask.height + 2 > canvas.height:
        return 0
    for _ in range(24):
        x = rng.randint(1, canvas.width - mask.width - 1)
        y = rng.randint(1, canvas.height - mask.height - 1)
        box = (float(x), float(y), float(x + mask.width), float(y + mask.height))
        near = [i for i, other in enumerate(boxes) if _meet(box, other, gap)]
        if near and not (
            overlap and _hides_little(canvas, mask, x, y, near=near, colour=colour, colours=colours)
        ):
            continue
        owner = canvas.paste(mask, x, y, rgb=rgb)
        boxes.append(box)
        colours.append(colour)
        return owner
    return 0


def _hides_little(
    canvas: Canvas,
    mask: Image.Image,
    x: int,
    y: int,
    *,
    near: list[int],
    colour: str,
    colours: list[str | None],
) -> bool:
    """Whether a shape may lie over its neighbours: shapes of other colours, with enough left to see."""
    if any(colours[i] in (None, colour) for i in near):
        return False
    return all(
        canvas.visible(owner) - hidden >= LEAST_VISIBLE * canvas.areas[owner]
        for owner, hidden in canvas.covered(mask, x, y).items()
    )


def _meet(a: Bounds, b: Bounds, gap: float) -> bool:
    """Whether two boxes come closer than `gap` px."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def shape_mask(shape: str, extent: float, *, turn: float = 0.0) -> Image.Image:
    """Draw one shape of so many px across, turned by degrees, as a tight 8-bit mask with smooth edges."""
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    half = extent / 2 * FINE
    points = [(half * (x * cosine - y * sine), half * (x * sine + y * cosine)) for x, y in _outline(shape)]
    left, top = min(x for x, _ in points), min(y for _, y in points)
    width = math.ceil((max(x for x, _ in points) - left) / FINE)
    height = math.ceil((max(y for _, y in points) - top) / FINE)
    fine = Image.new("L", (width * FINE, height * FINE))
    draw = ImageDraw.Draw(fine)
    draw.polygon([(x - left, y - top) for x, y in points], fill=255)
    if shape == "ring":
        rim = 0.42 * half
        draw.ellipse((rim, rim, 2 * half - rim, 2 * half - rim), fill=0)
    return fine.reduce(FINE)


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """List the corners of a shape, its longer extent from -1 to 1, y downwards."""
    if shape in ("circle", "ring"):
        return tuple((math.cos(a), math.sin(a)) for a in _angles(60))
    if shape == "square":
        return (-1, -1), (1, -1), (1, 1), (-1, 1)
    if shape == "diamond":
        return (0, -1), (0.72, 0), (0, 1), (-0.72, 0)
    if shape == "triangle":
        return (0, -0.87), (1, 0.87), (-1, 0.87)
    if shape == "cross":
        a = 0.33
        return (
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        )
    if shape == "star":
        radii = (1.05, 0.47)
        return tuple(
            (radii[i % 2] * math.sin(a), -radii[i % 2] * math.cos(a)) for i, a in enumerate(_angles(10))
        )
    return tuple(  # a heart
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
        )
        for a in _angles(48)
    )


def _angles(count: int) -> list[float]:
    """So many directions around the circle, in radians."""
    return [2 * math.pi * i / count for i in range(count)]
