"""The letters of drawn pictures: faces that every machine has, and the box of each letter's ink."""

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from seekvl.corpus.scene import Bounds, Rgb
from seekvl.runtime import require

FACES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
)
"""Faces that ship inside matplotlib, so that every machine draws the same letters."""


@cache
def _font_folder() -> Path:
    """Find the folder of matplotlib's own fonts."""
    return Path(require("matplotlib", extra="data").get_data_path()) / "fonts" / "ttf"


@lru_cache(maxsize=1024)
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """Load one of `FACES` at a size in px."""
    return ImageFont.truetype(str(_font_folder() / face), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def ink_box(face: str, size: int, letter: str) -> Bounds:
    """Find the tight box of a letter's ink in px from its origin; the box a font tells has blank sides."""
    sheet = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(sheet).text((size // 2, size), letter, font=font(face, size), fill=255, anchor="ls")
    left, top, right, bottom = sheet.getbbox() or (0, 0, 0, 0)
    return left - size // 2, top - size, right - size // 2, bottom - size


@cache
def cap_share(face: str) -> float:
    """Height of a capital letter as a share of the font's size."""
    _, top, _, bottom = font(face, 200).getbbox("H")
    return (bottom - top) / 200


@cache
def faces_for(capital: int) -> dict[str, int]:
    """Map each face that has capitals of exactly so many px to its size; hinting makes some faces skip some.

    >>> faces_for(10)["DejaVuSans.ttf"]
    14
    """
    return {
        face: size
        for face in FACES
        for size in range(capital, 2 * capital)
        if ink_box(face, size, "H")[1] == -capital and ink_box(face, size, "H")[3] == 0
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Hand:
    """How small print is written: upright and on whole px, so that the box of each letter is exact."""

    face: str
    """One of `FACES`."""
    size: int
    """Size of the font in px."""
    gap: int
    """Room between letters, beyond that of the font, in px."""

    @property
    def capital(self) -> int:
        """Height of a capital letter in px."""
        _, top, _, bottom = ink_box(self.face, self.size, "H")
        return round(bottom - top)

    def width(self, text: str) -> int:
        """Measure a text in px."""
        return sum(self._advance(letter) for letter in text) - self.gap

    def write(self, pen: ImageDraw.ImageDraw, text: str, *, left: int, base: int, rgb: Rgb) -> list[Bounds]:
        """Write a text from a left end on a base line, in px, and return the box of each letter's ink."""
        boxes = []
        for letter in text:
            pen.text((left, base), letter, font=font(self.face, self.size), fill=rgb, anchor="ls")
            x1, y1, x2, y2 = ink_box(self.face, self.size, letter)
            boxes.append((left + x1, base + y1, left + x2, base + y2))
            left += self._advance(letter)
        return boxes

    def _advance(self, letter: str) -> int:
        """Return the px from one letter to the next."""
        return round(font(self.face, self.size).getlength(letter)) + self.gap
