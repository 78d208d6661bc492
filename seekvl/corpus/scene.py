"""A drawn picture and what is in it: named colours, backgrounds, a canvas that knows each pixel's owner."""

import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Rgb = tuple[int, int, int]
Bounds = tuple[float, float, float, float]
Layout = Literal["list", "menu", "table", "banner", "ruler"]
"""Kinds of strips."""

COLOURS: dict[str, Rgb] = {
    "red": (216, 34, 40),
    "green": (36, 152, 58),
    "blue": (38, 82, 216),
    "yellow": (246, 218, 40),
    "orange": (244, 132, 24),
    "purple": (122, 42, 162),
    "pink": (246, 146, 192),
    "black": (22, 22, 24),
    "white": (246, 246, 246),
}
"""Colours of objects; `shade` varies them."""

GROUNDS: dict[str, Rgb] = {
    "white": (246, 246, 244),
    "grey": (170, 172, 174),
    "black": (30, 30, 33),
    "pale blue": (204, 222, 242),
    "pale green": (210, 236, 212),
    "pale yellow": (250, 242, 206),
    "pale pink": (248, 224, 230),
    "dark blue": (26, 36, 78),
    "dark green": (20, 58, 42),
    "brown": (112, 84, 60),
}
"""Colours of backgrounds."""

TEXTURES = ("plain", "plain", "gradient", "noise", "stripes", "blobs")
CLEAR = 95.0
"""Least distance in RGB between an object and every tone of what it lies on."""

SHORTEST, LONGEST = 176, 336
"""Sides of a canvas, in px."""
ASPECTS = (0.65, 1.5)
"""Width over height of a canvas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One thing in a picture."""

    kind: Literal["shape", "sign", "text", "letter", "bar"]
    """What sort of thing; "text" is a whole word or number, "letter" one letter of a word, "sign" what a
    word is on, also a panel of a strip.
    """
    name: str
    """How it is called, such as "red circle"."""
    colour: str
    """Name of its colour, a key of `COLOURS`."""
    shape: str
    """Shape of a shape, the letter of a letter, the word of a text, the label under a bar, else empty."""
    size: Literal["small", "medium", "large"]
    """How large it is beside the picture's longer side; bars, signs, words and letters are "medium"."""
    box: Bounds
    """x1, y1, x2, y2 in px: the tight box of its visible pixels (a turned letter: of its turned corners)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What belongs together at one place of a strip: a line, a column, a panel, a labelled tick."""

    text: Drawn
    """Its word; on a ruler its number."""
    number: Drawn | None = None
    """The number beside or under the word, in a table."""
    mark: Drawn | None = None
    """The panel under the word, the bullet before it, the pointer at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One picture with everything that is in it."""

    image: Image.Image
    """The picture, RGB."""
    style: Literal["shapes", "sign", "chart", "strip"]
    """Which of the four drawers made it."""
    background: str
    """Name of the background's colour, a key of `GROUNDS`."""
    objects: tuple[Drawn, ...]
    """The things in it, in the order they were drawn."""
    word: str = ""
    """What is written, in a picture of style "sign"."""
    layout: Layout | None = None
    """What a picture of style "strip" looks like."""
    entries: tuple[Entry, ...] = ()
    """The places of a strip, from top to bottom or from left to right; all their things are objects, too."""

    @property
    def shapes(self) -> tuple[Drawn, ...]:
        """The shapes among the objects."""
        return self.of("shape")

    def of(self, kind: str) -> tuple[Drawn, ...]:
        """List the objects of one kind."""
        return tuple(thing for thing in self.objects if thing.kind == kind)


def distance(a: Rgb, b: Rgb) -> float:
    """Euclidean distance of two colours in RGB.

    >>> distance((0, 0, 0), (3, 4, 0))
    5.0
    """
    return math.dist(a, b)


def luma(colour: Rgb) -> float:
    """Brightness of a colour, 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def distinct_colours(rng: random.Random, palette: dict[str, Rgb], count: int) -> list[str]:
    """Choose so many colours by name, no two of them close; fewer where the palette has no more."""
    names: list[str] = []
    for name in rng.sample(tuple(palette), len(palette)):
        if len(names) < count and all(distance(palette[name], palette[other]) >= 60 for other in names):
            names.append(name)
    return names


def jittered(rng: random.Random, colour: Rgb, *, amount: int) -> Rgb:
    """Move each channel by at most `amount`."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
    return red, green, blue


def shade(rng: random.Random, name: str) -> Rgb:
    """Draw one shade of a named colour: up to 12 lighter or darker, and up to 6 more in each channel."""
    return jittered(rng, _shifted(COLOURS[name], rng.randint(-12, 12)), amount=6)


def canvas_size(rng: random.Random, *, least_aspect: float = ASPECTS[0]) -> tuple[int, int]:
    """Draw width and height of a picture in px; two in five are square."""
    longer = rng.randint(SHORTEST + 40, LONGEST)
    if rng.random() < 0.4:
        return longer, longer
    aspect = math.exp(rng.uniform(math.log(least_aspect), math.log(ASPECTS[1])))
    width, height = (longer, longer / aspect) if aspect >= 1 else (longer * aspect, longer)
    short = min(width, height)
    scale = max(1.0, SHORTEST / short)
    return min(LONGEST, round(width * scale)), min(LONGEST, round(height * scale))


class Canvas:
    """A picture being drawn, with the owner of each pixel: 0 is the background, k the k-th thing pasted."""

    def __init__(self, rng: random.Random, width: int, height: int, *, calm: bool = False) -> None:
        self.width, self.height = width, height
        self.longer = max(width, height)
        self.background = rng.choice(tuple(GROUNDS))
        self.image, self.tones = _paint_ground(rng, width, height, name=self.background, calm=calm)
        self.owners = np.zeros((height, width), dtype=np.uint8)
        self.areas: list[int] = [0]

    def clear_colours(self, rng: random.Random) -> dict[str, Rgb]:
        """Draw a shade of every colour and keep those that stand out from the background, by name."""
        shades = {name: shade(rng, name) for name in COLOURS}
        return {
            name: rgb
            for name, rgb in shades.items()
            if min(distance(rgb, tone) for tone in self.tones) >= CLEAR
        }

    def covered(self, mask: Image.Image, x: int, y: int) -> dict[int, int]:
        """Count how many pixels of each owner a mask with its corner at x, y would hide."""
        solid = np.asarray(mask) > 127
        below = self.owners[y : y + mask.height, x : x + mask.width]
        counts = np.bincount(below[solid], minlength=1)
        return {owner: int(count) for owner, count in enumerate(counts) if owner and count}

    def visible(self, owner: int) -> int:
        """Count the pixels a thing still shows."""
        return int((self.owners == owner).sum())

    def paste(self, mask: Image.Image, x: int, y: int, *, rgb: Rgb) -> int:
        """Draw a mask in one colour with its corner at x, y and return the number of the new owner."""
        self.image.paste(rgb, (x, y), mask)
        solid = np.asarray(mask) > 127
        owner = len(self.areas)
        self.owners[y : y + mask.height, x : x + mask.width][solid] = owner
        self.areas.append(int(solid.sum()))
        return owner

    def box(self, *owners: int) -> Bounds:
        """Find the tight box in px around the visible pixels of these things together."""
        mine = np.isin(self.owners, owners)
        rows, columns = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
        return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)

    def grain(self, rng: random.Random) -> Image.Image:
        """Finish the picture; one in five has grain over everything."""
        if rng.random() >= 0.2:
            return self.image
        return _add_grain(rng, self.image, strength=rng.randint(4, 14))


def _add_grain(rng: random.Random, image: Image.Image, *, strength: int) -> Image.Image:
    """Add grey noise of at most `strength` to a picture."""
    noise = np.frombuffer(rng.randbytes(image.width * image.height), dtype=np.uint8)
    offset = noise.astype(np.int16) % (2 * strength + 1) - strength
    pixels = np.asarray(image).astype(np.int16) + offset.reshape(image.height, image.width, 1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _paint_ground(
    rng: random.Random, width: int, height: int, *, name: str, calm: bool
) -> tuple[Image.Image, tuple[Rgb, ...]]:
    """Paint a background and list the tones in it."""
    base = jittered(rng, GROUNDS[name], amount=6)
    texture = "plain" if calm and rng.random() < 0.6 else rng.choice(TEXTURES)
    reach = rng.randint(8, 20)
    darker, lighter = (jittered(rng, _shifted(base, step), amount=4) for step in (-reach, reach))
    tones = (base, darker, lighter)
    if texture == "gradient":
        corners = Image.new("RGB", (2, 2))
        corners.putdata([rng.choice(tones) for _ in range(3)] + [darker])
        return corners.resize((width, height), Image.Resampling.BILINEAR), tones
    if texture == "blobs":
        side = rng.randint(4, 8)
        spots = Image.new("RGB", (side, side))
        spots.putdata([rng.choice(tones) for _ in range(side * side)])
        return spots.resize((width, height), Image.Resampling.BICUBIC), tones
    if texture == "stripes":
        angle, period = rng.uniform(0, math.pi), rng.uniform(6, 24)
        across = np.arange(width, dtype=np.float32) * math.cos(angle) / period
        down = np.arange(height, dtype=np.float32) * math.sin(angle) / period
        odd = np.floor(across[None, :] + down[:, None]).astype(np.int32) & 1  # h w
        return Image.fromarray(np.array([base, darker], dtype=np.uint8)[odd]), tones
    plain = Image.new("RGB", (width, height), base)
    return (_add_grain(rng, plain, strength=reach) if texture == "noise" else plain), tones


def _shifted(colour: Rgb, step: int) -> Rgb:
    """Make a colour lighter or, with a negative step, darker."""
    red, green, blue = (min(255, max(0, channel + step)) for channel in colour)
    return red, green, blue
