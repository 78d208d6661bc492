"""Boxes drawn into pictures, as PNG or SVG, with labels that cover neither each other nor small boxes.

Where the labels go is decided once, by `plan`, for both forms. Letters: n places for a label, k boxes.
"""

import base64
import colorsys
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from seekvl.processing.boxes import Box
from seekvl.processing.fonts import Font, font_for
from seekvl.processing.pad_image import to_rgb
from seekvl.runtime import log

Colour: TypeAlias = tuple[int, int, int]
Corners: TypeAlias = tuple[float, float, float, float]
Spots: TypeAlias = NDArray[np.float64]

COLOURS: tuple[Colour, ...] = (
    (230, 25, 75),
    (0, 110, 230),
    (20, 150, 60),
    (245, 130, 20),
    (145, 30, 180),
    (0, 150, 160),
    (215, 60, 170),
    (130, 85, 30),
    (255, 205, 0),
    (60, 60, 60),
)
"""The first labels have these colours, later ones some of their own."""
RED: Colour = (255, 0, 0)
WHITE: Colour = (255, 255, 255)

SMALLEST = 9
"""Px of the smallest letters that are tried when labels find no room."""
PAD_X, PAD_Y = 3, 2
"""Px between a label's letters and the rim of its plate."""
TOUCHING = 3
"""Px between a label and its box below which they are seen as one."""
HIDDEN = 4.0
"""What hiding a whole box costs a place for a label, in heights of the label away from its box."""
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What no font draws and no XML may hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plate:
    """A label with its place in px: a rectangle of colour that the letters stand on."""

    text: str
    corners: Corners
    """The rectangle."""
    box: Corners
    """The box it belongs to."""
    colour: Colour
    size: int
    """Px of the letters."""

    @property
    def ink(self) -> Colour:
        """Black on bright colours, white on dark ones."""
        red, green, blue = self.colour
        brightness = (299 * red + 587 * green + 114 * blue) / 1000  # ITU-R BT.601
        return (0, 0, 0) if brightness > 140 else (255, 255, 255)

    @property
    def leader(self) -> Corners | None:
        """The line from the plate to its box; None where they touch."""
        if _distance(self.corners, self.box) < TOUCHING:
            return None
        (px1, py1, px2, py2), (x1, y1, x2, y2) = self.corners, self.box
        x, y = min(max((px1 + px2) / 2, x1), x2), min(max((py1 + py2) / 2, y1), y2)  # nearest of the box
        return min(max(x, px1), px2), min(max(y, py1), py2), x, y


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Draw boxes with their labels onto an RGB copy of a picture; a colour for each label.

    Labels never overlap: one moves, with a line to its box, or all become smaller. One that finds no room at
    all is left out, and the log says so.
    """
    canvas = _copy(image)
    draw = ImageDraw.Draw(canvas)
    thick = _thickness(canvas.size)
    for corners, colour in zip(_places(boxes, canvas.size), _colours(boxes), strict=True):
        draw.rectangle(corners, outline=colour, width=thick)
    plates = plan(canvas.size, boxes)
    for plate in plates:
        if plate.leader is not None:
            draw.line(plate.leader, fill=plate.colour, width=max(1, thick // 2))
    for plate in plates:  # labels last, so that no line crosses them
        draw.rectangle(plate.corners, fill=plate.colour)
        font = font_for(plate.text, size=plate.size)
        left, top = _extent(plate.text, font)[:2]
        x, y = plate.corners[0] + PAD_X - left, plate.corners[1] + PAD_Y - top
        draw.text((x, y), plate.text, fill=plate.ink, font=font)
    return canvas


def svg_boxes(image: Image.Image, boxes: Sequence[Box]) -> str:
    """Draw boxes as an SVG: the picture inside of it, each box and label an element that can be edited.

    Letters are those of the viewer's fonts, stretched to the width that was planned for them.
    """
    canvas = _copy(image)
    width, height = canvas.size
    encoded = io.BytesIO()
    canvas.save(encoded, format="PNG")
    data = base64.b64encode(encoded.getvalue()).decode()
    thick = _thickness(canvas.size)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">',
        f'<image width="{width}" height="{height}" href="data:image/png;base64,{data}"/>',
    ]
    for box, corners, colour in zip(boxes, _places(boxes, canvas.size), _colours(boxes), strict=True):
        title = f"<title>{_escaped(box.label)} {' '.join(map(str, box.corners))}</title>"
        outline = f'fill="none" stroke="{_hex(colour)}" stroke-width="{thick}"'
        lines.append(f"<rect {_svg_corners(corners, inset=thick / 2)} {outline}>{title}</rect>")
    plates = plan(canvas.size, boxes)
    lines += [_svg_leader(plate, thick=max(1, thick // 2)) for plate in plates if plate.leader is not None]
    lines += [_svg_plate(plate) for plate in plates]
    return "\n".join([*lines, "</svg>", ""])


def mark_object(image: Image.Image, box: Box) -> Image.Image:
    """Draw a red rectangle around one thing, as the first picture of `grounding.in_context` has it."""
    canvas = _copy(image)
    (corners,) = _places([box], canvas.size)
    ImageDraw.Draw(canvas).rectangle(corners, outline=RED, width=_thickness(canvas.size) + 1)
    return canvas


def plan(size: tuple[int, int], boxes: Sequence[Box]) -> list[Plate]:
    """Find places in a picture of this size, in px, for the labels of boxes, so that no two overlap.

    When there is no room for all, smaller letters are tried; with the smallest, what has no room is left out.
    """
    shorter = min(size)
    letters = max(11, shorter // 28)
    wanted = sum(bool(_shown(box.label)) for box in boxes)
    while True:
        plates = _try(size, boxes, letters=letters)
        if len(plates) == wanted:
            return plates
        if letters <= SMALLEST:
            break
        letters = max(SMALLEST, int(letters * 0.85))
    log.warning(
        "%d of %d labels find no room in a picture of %dx%d px and are left out",
        wanted - len(plates), wanted, *size
    )  # fmt: skip
    return plates


def _try(size: tuple[int, int], boxes: Sequence[Box], *, letters: int) -> list[Plate]:
    """Place labels one after the other, with letters of this size in px; what finds no place is missing."""
    places, plates = _places(boxes, size), list[Plate]()
    for box, corners, colour in zip(boxes, places, _colours(boxes), strict=True):
        text = _shown(box.label)
        if not text:
            continue
        font = font_for(text, size=letters)
        text = _shortened(text, font, width=size[0] - 2 * PAD_X)
        left, top, right, bottom = _extent(text, font)
        plate_size = (math.ceil(right - left) + 2 * PAD_X, math.ceil(bottom - top) + 2 * PAD_Y)
        taken = [plate.corners for plate in plates]
        found = _best(_spots(corners, plate_size, size), taken=taken, box=corners, boxes=places)
        if found is not None:
            plates.append(Plate(text=text, corners=found, box=corners, colour=colour, size=letters))
    return plates


def _spots(box: Corners, plate: tuple[int, int], size: tuple[int, int]) -> Iterator[Spots]:
    """Offer places for a label inside a picture: first those at its box, then all over.

     1-----2      1 and 2 stand on the box, 3 and 4 hang below it,
    10     9      5 to 8 are inside of its corners, 9 and 10 beside it
     3-----4
    """
    (x1, y1, x2, y2), (wide, high), (width, height) = box, plate, size
    if wide > width or high > height:
        return
    right, bottom = x2 - wide + 1, y2 - high + 1
    corners = [
        (x1, y1 - high), (right, y1 - high), (x1, y2 + 2), (right, y2 + 2),
        (x1, y1), (right, y1), (x1, bottom), (right, bottom),
        (x2 + 2, y1), (x1 - wide, y1),
    ]  # fmt: skip
    yield _inside(np.array(corners), plate, size)
    rows = range(0, height - high + 1, max(1, high // 2))
    columns = range(0, width - wide + 1, max(1, wide // 4))
    yield _inside(np.array([(x, y) for y in rows for x in columns]), plate, size)


def _best(
    offers: Iterator[Spots], *, taken: Sequence[Corners], box: Corners, boxes: Sequence[Corners]
) -> Corners | None:
    """Choose the free place that is nearest to its box and hides least of small boxes."""
    plates, others = np.array(taken).reshape(-1, 4), np.array(boxes).reshape(-1, 4)
    areas = (others[:, 2:] - others[:, :2] + 1).prod(axis=1)  # k
    for spots in offers:
        free = spots[~_shared(spots, plates).any(axis=1)]  # n 4
        if len(free):
            gaps = np.maximum(np.maximum(free[:, :2] - box[2:], box[:2] - free[:, 2:]), 0)  # n 2
            away = np.hypot(gaps[:, 0], gaps[:, 1])  # n
            away = np.where(away < TOUCHING, 0, away) / (free[0, 3] - free[0, 1] + 1)
            hidden = (_shared(free, others) / areas).sum(axis=1)  # n
            x1, y1, x2, y2 = free[(away + HIDDEN * hidden).argmin()].tolist()
            return x1, y1, x2, y2
    return None


def _inside(corners: Spots, plate: tuple[int, int], size: tuple[int, int]) -> Spots:
    """Make rectangles f[n, 4] of plates with these upper left corners f[n, 2], moved into the picture."""
    room = np.array(size) - np.array(plate)
    corners = np.floor(np.clip(corners, 0, room))
    return np.concatenate((corners, corners + np.array(plate) - 1), axis=1)


def _shared(a: Spots, b: Spots) -> Spots:
    """Measure f[n, k], what rectangles f[n, 4] and f[k, 4] share, in px; last rows and columns count."""
    ends = np.minimum(a[:, None, 2:], b[None, :, 2:])  # n k 2
    starts = np.maximum(a[:, None, :2], b[None, :, :2])
    shared: Spots = np.maximum(ends - starts + 1, 0).prod(axis=2)
    return shared


def _shortened(text: str, font: Font, *, width: int) -> str:
    """Cut a text so that it is no wider than this many px, and show that it was cut."""
    if _width(text, font) <= width:
        return text
    few, many = 0, len(text)  # letters that fit, letters that do not
    while many - few > 1:
        middle = (few + many) // 2
        if _width(text[:middle].rstrip() + "...", font) <= width:
            few = middle
        else:
            many = middle
    return text[:few].rstrip() + "..."


def _extent(text: str, font: Font) -> Corners:
    """Measure a text: left, top, right, bottom in px; high enough for any Latin letter."""
    left, top, right, bottom = font.getbbox(text)
    _, highest, _, lowest = font.getbbox("Ag")
    return left, min(top, highest), right, max(bottom, lowest)


def _width(text: str, font: Font) -> float:
    left, _, right, _ = font.getbbox(text)
    return right - left


def _shown(label: str) -> str:
    """Make one line of a label, without what cannot be seen."""
    return UNSEEN.sub("\ufffd", " ".join(label.split()))


def _places(boxes: Sequence[Box], size: tuple[int, int]) -> list[Corners]:
    """Give the px of boxes, the last row and column included."""
    return [box.pixels(size[0] - 1, size[1] - 1) for box in boxes]


def _colours(boxes: Sequence[Box]) -> list[Colour]:
    """Give each box the colour of its label."""
    labels = list(dict.fromkeys(box.label for box in boxes))
    return [_colour(labels.index(box.label)) for box in boxes]


def _colour(index: int) -> Colour:
    """Give the colour of the label of this index, unlike those of its neighbours."""
    if index < len(COLOURS):
        return COLOURS[index]
    hue = index * 0.618034 % 1  # steps of the golden section never meet
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, 0.85 if index % 2 else 0.6)
    return round(red * 255), round(green * 255), round(blue * 255)


def _thickness(size: tuple[int, int]) -> int:
    """Choose the px of a line for a picture of this size."""
    return max(2, min(size) // 150)


def _copy(image: Image.Image) -> Image.Image:
    """Make an RGB copy, white where the picture is transparent."""
    canvas = to_rgb(image, backdrop=WHITE, mode="seekvl")
    return image.copy() if canvas is image else canvas


def _distance(a: Corners, b: Corners) -> float:
    """Measure the gap between two rectangles, in px."""
    across = max(a[0] - b[2], b[0] - a[2], 0)
    down = max(a[1] - b[3], b[1] - a[3], 0)
    return math.hypot(across, down)


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _escaped(text: str) -> str:
    return escape(_shown(text))


def _svg_corners(corners: Corners, *, inset: float = 0.0) -> str:
    """Write a rectangle that covers the same px as Pillow's; a line is drawn inside of it."""
    x1, y1, x2, y2 = corners
    wide, high = max(x2 - x1 + 1 - 2 * inset, 0), max(y2 - y1 + 1 - 2 * inset, 0)
    return f'x="{x1 + inset:.2f}" y="{y1 + inset:.2f}" width="{wide:.2f}" height="{high:.2f}"'


def _svg_leader(plate: Plate, *, thick: int) -> str:
    """Write the line from a label to its box."""
    assert plate.leader is not None
    x1, y1, x2, y2 = plate.leader
    ends = f'x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"'
    return f'<line {ends} stroke="{_hex(plate.colour)}" stroke-width="{thick}"/>'


def _svg_plate(plate: Plate) -> str:
    """Write a label on its plate."""
    x1, y1, x2, _ = plate.corners
    font = font_for(plate.text, size=plate.size)
    top = _extent(plate.text, font)[1]
    baseline = y1 + PAD_Y - top + font.getbbox("A")[3]
    place = f'x="{x1 + PAD_X:.2f}" y="{baseline:.2f}" textLength="{x2 - x1 + 1 - 2 * PAD_X:.2f}"'
    letters = f'font-family="sans-serif" font-size="{plate.size}" fill="{_hex(plate.ink)}"'
    return (
        f'<g><rect {_svg_corners(plate.corners)} fill="{_hex(plate.colour)}"/>'
        f'<text {place} lengthAdjust="spacingAndGlyphs" {letters}>{escape(plate.text)}</text></g>'
    )
