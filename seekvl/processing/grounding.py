"""Boxes in answers: `<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2]]<|/det|>` (2412.10302, sec. 3).

Coordinates refer to the original picture, not to its padded square: 0 is the left or upper edge, 999 the
other one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from PIL import Image, ImageDraw, ImageFont

from seekvl.runtime import SeekVLError

TOP = 999
"""Largest coordinate."""

MARKED = re.compile(
    r"<\|ref\|>((?:(?!<\|ref\|>).)*?)<\|/ref\|>\s*<\|det\|>((?:(?!<\|ref\|>).)*?)<\|/det\|>", re.DOTALL
)
NUMBER = r"\s*(\d{1,9}(?:\.\d*)?)\s*"
FOUR_NUMBERS = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}(?:,[\s\d.,]*)?\]")
MARKS = re.compile(r"<\|/?ref\|>|<\|grounding\|>")
COLOURS = ((230, 25, 75), (0, 110, 230), (20, 150, 60), (245, 130, 20), (145, 30, 180), (0, 150, 160))


@dataclass(frozen=True, slots=True)
class Box:
    """A labelled box in a picture; coordinates are whole numbers, 0..999.

    Raises SeekVLError for coordinates outside of that, or with the corners swapped.
    """

    label: str
    x1: int
    y1: int
    x2: int
    y2: int
    image: int = 0
    """Index of the picture, in order of appearance."""

    def __post_init__(self) -> None:
        if not all(isinstance(value, Integral) for value in self.corners) or not _possible(self.corners):
            raise SeekVLError(
                f"box {self.corners} of {self.label!r}: whole numbers needed, 0 <= x1 <= x2 <= {TOP}"
            )

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """The coordinates x1, y1, x2, y2."""
        return self.x1, self.y1, self.x2, self.y2

    def pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Give x1, y1, x2, y2 in px of a picture of this size.

        >>> Box("dog", 0, 0, 999, 333).pixels(640, 480)
        (0.0, 0.0, 640.0, 160.0)
        """
        return self.x1 / TOP * width, self.y1 / TOP * height, self.x2 / TOP * width, self.y2 / TOP * height


def iou(a: Box, b: Box) -> float:
    """Measure the overlap of two boxes: intersection over union, 0 for two boxes without area.

    >>> iou(Box("a", 0, 0, 10, 10), Box("b", 5, 0, 15, 10))
    0.3333333333333333
    """
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    shared = max(width, 0) * max(height, 0)
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def parse_boxes(text: str, *, image: int = 0) -> list[Box]:
    """Find the boxes in an answer, in order; one label may have several. What is malformed is left out.

    Fractions are rounded, and of more than four numbers the first four count, as in the reference.

    >>> parse_boxes("a <|ref|>dog<|/ref|><|det|>[[1, 2, 3, 4], [9, 9, 1, 1]]<|/det|>")
    [Box(label='dog', x1=1, y1=2, x2=3, y2=4, image=0)]
    """
    boxes = []
    for label, inner in MARKED.findall(text):
        for numbers in FOUR_NUMBERS.findall(inner):
            x1, y1, x2, y2 = (round(float(number)) for number in numbers)
            if _possible((x1, y1, x2, y2)):
                boxes.append(Box(label, x1, y1, x2, y2, image))
    return boxes


def format_box(label: str, boxes: Sequence[Box | tuple[int, int, int, int]]) -> str:
    """Write the boxes of one label as a model does.

    Raises SeekVLError without boxes, for impossible ones, and for a label that holds a mark.

    >>> format_box("dog", [(1, 2, 3, 4)])
    '<|ref|>dog<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>'
    """
    if not boxes:
        raise SeekVLError(f"no boxes for {label!r}: give at least one")
    if re.search(r"<\|/?(ref|det|grounding)\|>", label):
        raise SeekVLError(f"the label {label!r} holds a grounding mark; take it out")
    checked = [box if isinstance(box, Box) else Box(label, *box) for box in boxes]
    inner = ", ".join(f"[{box.x1}, {box.y1}, {box.x2}, {box.y2}]" for box in checked)
    return f"<|ref|>{label}<|/ref|><|det|>[{inner}]<|/det|>"


def strip_marks(text: str) -> str:
    """Make an answer readable: labels stay, marks and coordinates go.

    >>> strip_marks("It is <|ref|>the dog<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>.")
    'It is the dog.'
    """
    without = re.sub(r"\s*<\|det\|>.*?(<\|/det\|>|$)", "", text, flags=re.DOTALL)
    return MARKS.sub("", without).strip()


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Draw boxes with their labels onto an RGB copy of a picture; a colour for each label."""
    canvas = image.convert("RGB")
    if canvas is image:
        canvas = image.copy()
    draw = ImageDraw.Draw(canvas)
    shorter = min(canvas.size)
    thick = max(2, shorter // 150)
    font = ImageFont.load_default(size=max(11, shorter // 28))
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        colour = COLOURS[labels.index(box.label) % len(COLOURS)]
        x1, y1, x2, y2 = box.pixels(canvas.width - 1, canvas.height - 1)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=thick)
    for box in boxes:  # labels last, so that no line crosses them
        if box.label:
            colour = COLOURS[labels.index(box.label) % len(COLOURS)]
            _draw_label(draw, canvas.size, box, font=font, colour=colour)
    return canvas


def _draw_label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Box,
    *,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour: tuple[int, int, int],
) -> None:
    """Write a label on its colour: above the box if there is room, else in it, never outside the picture."""
    width, height = size
    x1, y1, _, _ = box.pixels(width - 1, height - 1)
    left, top, right, bottom = draw.textbbox((0, 0), box.label, font=font)
    plate_width, plate_height = right - left + 6, bottom - top + 4
    x = max(0.0, min(x1, width - plate_width))
    y = y1 - plate_height if y1 >= plate_height else y1
    y = max(0.0, min(y, height - plate_height))
    draw.rectangle((x, y, x + plate_width, y + plate_height), fill=colour)
    brightness = (299 * colour[0] + 587 * colour[1] + 114 * colour[2]) / 1000  # ITU-R BT.601
    ink = (0, 0, 0) if brightness > 140 else (255, 255, 255)
    draw.text((x + 3 - left, y + 2 - top), box.label, fill=ink, font=font)


def _area(box: Box) -> int:
    return (box.x2 - box.x1) * (box.y2 - box.y1)


def _possible(corners: tuple[int, int, int, int]) -> bool:
    x1, y1, x2, y2 = corners
    return 0 <= x1 <= x2 <= TOP and 0 <= y1 <= y2 <= TOP
