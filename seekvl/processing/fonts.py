"""A font that has the letters of a text: Pillow's own for Latin, else one that this machine has.

Pillow's font knows no Chinese, Japanese or Korean. Fonts are looked for where systems keep them, well-known
ones first, and only when a text needs one.
"""

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from PIL import ImageFont

from seekvl.runtime import log

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

KNOWN = (
    "NotoSansCJK",
    "NotoSansSC",
    "NotoSansCJKsc",
    "SourceHanSans",
    "wqy-microhei",
    "wqy-zenhei",
    "DroidSansFallback",
    "PingFang",
    "Hiragino Sans GB",
    "STHeiti",
    "Arial Unicode",
    "msyh",
    "simhei",
    "simsun",
    "DejaVuSans",
)
"""Beginnings of the file names of fonts with many letters, the best to read first."""

SUFFIXES = (".ttf", ".ttc", ".otf")
MOST = 200
"""Fonts of unknown name that are tried at most, for opening one takes milliseconds."""

ABSENT = "\U0010fffe"
"""No letter; a font draws it, and every letter it lacks, as the same empty box."""


def folders() -> list[Path]:
    """List the folders where systems keep fonts; those that do not exist included."""
    home = Path.home()
    if sys.platform == "win32":
        windows = Path(os.environ.get("WINDIR", r"C:\Windows"))
        return [windows / "Fonts", home / "AppData" / "Local" / "Microsoft" / "Windows" / "Fonts"]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"]
    shared = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts")]
    return [*shared, home / ".local" / "share" / "fonts", home / ".fonts"]


def font_for(text: str, *, size: int) -> Font:
    """Find a font of this size in px with every letter of a text, or the one that lacks the fewest.

    Letters that none has come out as empty boxes, and a warning says so once for each set of letters.
    """
    own = ImageFont.load_default(size=size)
    missing = lacks(own, text)
    if not missing:
        return own
    path = _find(missing)
    if path is None:
        return own
    return ImageFont.truetype(str(path), size=size)


def lacks(font: Font, text: str) -> str:
    """List the letters of a text that a font does not have, each once."""
    letters = "".join(dict.fromkeys(letter for letter in text if not letter.isspace()))
    if not isinstance(font, ImageFont.FreeTypeFont):
        return "".join(letter for letter in letters if not letter.isascii())  # Pillow without FreeType
    empty = _drawn(font, ABSENT)
    return "".join(letter for letter in letters if _drawn(font, letter) == empty)


@lru_cache(maxsize=256)
def _find(letters: str) -> Path | None:
    """Find the font file that lacks the fewest of these letters; None where none has any of them."""
    best, fewest = None, len(letters)
    for path in _files():
        try:
            missing = lacks(ImageFont.truetype(str(path), size=16), letters)
        except OSError:  # a file by the name of a font that is none
            continue
        if len(missing) < fewest:
            best, fewest = path, len(missing)
        if not missing:
            return path
    log.warning(
        "no font on this machine has the letters %s: pixels show them as empty boxes; "
        "install one, for instance Noto Sans CJK, or draw an SVG, whose viewer brings its own",
        letters if best is None else lacks(ImageFont.truetype(str(best), size=16), letters),
    )
    return best


@lru_cache(maxsize=1)
def _files() -> tuple[Path, ...]:
    """List the font files of this machine, well-known ones first."""
    files = sorted(
        path for folder in folders() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES
    )
    known = [path for name in KNOWN for path in files if path.name.startswith(name)]
    plain = [path for path in known if "Regular" in path.name or path.stem in KNOWN]
    others = [path for path in files if path not in known]
    return tuple(dict.fromkeys((*plain, *known, *others[:MOST])))


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    """Draw a letter, to compare it with others."""
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
