"""Boxes: typed corners in 0..999, their pixels, the forms of other programs, overlap, matching, accuracy.

Coordinates refer to the original picture, not to its padded square or its tiles: 0 is the left or upper edge,
999 the other one (2412.10302, sec. 3).

form     numbers                                 unit             also known from
corners  x1, y1, x2, y2                          0..999           answers of the models
pixels   x1, y1, x2, y2                          px               Pascal VOC
xywh     left, top, width, height                px               COCO
yolo     centre x, centre y, width, height       share of a side  YOLO label files

Into a box each coordinate goes to the nearest of the 1,000 steps: it moves by half a step at most, a
1/1,998 of the side. Out of a box and back gives the same box, in every form but whole pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from seekvl.runtime import SeekVLError

TOP = 999
"""Largest coordinate."""

SLACK = 1.0
"""Px by which a box may stand out of its picture and is cut at the edge: published annotations round so."""


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
        values: tuple[object, ...] = self.corners
        whole = all(isinstance(value, Integral) and not isinstance(value, bool) for value in values)
        if not whole or not (0 <= self.x1 <= self.x2 <= TOP and 0 <= self.y1 <= self.y2 <= TOP):
            raise SeekVLError(
                f"box {self.corners} of {self.label!r}: whole numbers needed, 0 <= x1 <= x2 <= {TOP} "
                f"and 0 <= y1 <= y2 <= {TOP}"
            )
        for name in ("x1", "y1", "x2", "y2"):  # numpy's whole numbers become Python's, for JSON's sake
            object.__setattr__(self, name, int(getattr(self, name)))

    @classmethod
    def from_pixels(
        cls, label: str, corners: Sequence[float], *, width: int, height: int, image: int = 0
    ) -> "Box":
        """Make a box from x1, y1, x2, y2 in px of a picture of this size.

        Raises SeekVLError for swapped corners, and for a box that stands out by more than `SLACK`.

        >>> Box.from_pixels("dog", (0, 0, 640, 160), width=640, height=480)
        Box(label='dog', x1=0, y1=0, x2=999, y2=333, image=0)
        """
        x1, y1, x2, y2 = _four(corners, form="x1, y1, x2, y2")
        _check_size(width, height)
        if x1 > x2 or y1 > y2:
            raise SeekVLError(f"box {tuple(corners)} px of {label!r}: swapped corners, x1 <= x2 and y1 <= y2")
        return cls(
            label,
            _step(x1, width, slack=SLACK),
            _step(y1, height, slack=SLACK),
            _step(x2, width, slack=SLACK),
            _step(y2, height, slack=SLACK),
            image,
        )

    @classmethod
    def from_xywh(
        cls, label: str, xywh: Sequence[float], *, width: int, height: int, image: int = 0
    ) -> "Box":
        """Make a box from left, top, width and height in px, as COCO has them; errors as `from_pixels`.

        >>> Box.from_xywh("dog", (320, 0, 320, 160), width=640, height=480)
        Box(label='dog', x1=500, y1=0, x2=999, y2=333, image=0)
        """
        left, top, wide, high = _four(xywh, form="left, top, width, height")
        corners = (left, top, left + wide, top + high)
        return cls.from_pixels(label, corners, width=width, height=height, image=image)

    @classmethod
    def from_yolo(cls, label: str, cxcywh: Sequence[float], *, image: int = 0) -> "Box":
        """Make a box from centre x, centre y, width and height as shares of the sides, as YOLO has them.

        Raises SeekVLError for a negative width or height, and for a box that stands out by more than a step.

        >>> Box.from_yolo("dog", (0.5, 0.5, 1.0, 0.5))
        Box(label='dog', x1=0, y1=250, x2=999, y2=749, image=0)
        """
        x, y, wide, high = _four(cxcywh, form="centre x, centre y, width, height")
        if wide < 0 or high < 0:
            raise SeekVLError(f"box {tuple(cxcywh)} of {label!r}: its width and height must not be negative")
        corners = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
        x1, y1, x2, y2 = (_step(value, 1, slack=1 / TOP) for value in corners)
        return cls(label, x1, y1, x2, y2, image)

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

    def pixel_ints(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Give x1, y1, x2, y2 in whole px as the reference does: cut, not rounded; 999 is the full side.

        >>> Box("giraffe", 243, 133, 606, 557).pixel_ints(640, 480)
        (155, 63, 388, 267)
        """
        x1, y1, x2, y2 = self.pixels(width, height)
        return int(x1), int(y1), int(x2), int(y2)

    def xywh(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Give left, top, width and height in px of a picture of this size, the form of COCO.

        >>> Box("dog", 0, 333, 999, 999).xywh(640, 480)
        (0.0, 160.0, 640.0, 320.0)
        """
        x1, y1, x2, y2 = self.pixels(width, height)
        return x1, y1, x2 - x1, y2 - y1

    def yolo(self) -> tuple[float, float, float, float]:
        """Give centre x, centre y, width and height as shares of the sides, the form of YOLO.

        >>> Box("dog", 0, 333, 999, 999).yolo()[2]
        1.0
        """
        across, down = self.x1 + self.x2, self.y1 + self.y2
        return across / 2 / TOP, down / 2 / TOP, (self.x2 - self.x1) / TOP, (self.y2 - self.y1) / TOP


@dataclass(frozen=True, slots=True)
class Pair:
    """Two boxes that were matched."""

    wanted: int
    """Index among the wanted boxes."""
    found: int
    """Index among the found ones."""
    iou: float
    """Their overlap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matches:
    """Which of the found boxes are which of the wanted ones."""

    pairs: tuple[Pair, ...]
    """Best overlap first; each box is in one pair at most."""
    wanted: int
    """Number of boxes that should be found."""
    found: int
    """Number of boxes that were."""

    @property
    def precision(self) -> float:
        """Share of the found boxes that were wanted; 1 where none was found."""
        return len(self.pairs) / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Share of the wanted boxes that were found; 1 where none was wanted."""
        return len(self.pairs) / self.wanted if self.wanted else 1.0

    @property
    def f1(self) -> float:
        """Twice the pairs over all boxes of both sides; 1 where there are none."""
        boxes = self.wanted + self.found
        return 2 * len(self.pairs) / boxes if boxes else 1.0


def iou(a: Box, b: Box) -> float:
    """Measure the overlap of two boxes: intersection over union, 0 for two boxes without area.

    The size of the picture does not matter: stretching a side changes both areas alike.

    >>> iou(Box("a", 0, 0, 10, 10), Box("b", 5, 0, 15, 10))
    0.3333333333333333
    """
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    shared = max(width, 0) * max(height, 0)
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def match(
    wanted: Sequence[Box], found: Sequence[Box], *, least: float = 0.5, same_label: bool = True
) -> Matches:
    """Pair boxes of the same picture whose overlap is at least `least`, the best overlap first.

    same_label: pair only boxes whose labels are equal, but for case and blanks around them.

    >>> match([Box("dog", 0, 0, 10, 10)], [Box("Dog", 0, 0, 10, 8), Box("cat", 0, 0, 10, 10)]).pairs
    (Pair(wanted=0, found=0, iou=0.8),)
    """
    possible = [
        Pair(i, j, iou(a, b))
        for i, a in enumerate(wanted)
        for j, b in enumerate(found)
        if a.image == b.image and (not same_label or _same(a.label, b.label))
    ]
    pairs: list[Pair] = []
    for pair in sorted(possible, key=lambda pair: -pair.iou):
        taken = any(pair.wanted == other.wanted or pair.found == other.found for other in pairs)
        if pair.iou >= least and not taken:
            pairs.append(pair)
    return Matches(pairs=tuple(pairs), wanted=len(wanted), found=len(found))


def accuracy(wanted: Sequence[Box], found: Sequence[Sequence[Box]], *, least: float = 0.5) -> float:
    """Return the share of questions whose first found box overlaps the wanted one by at least `least`.

    This is the accuracy at 0.5 of RefCOCO: labels do not count, and an answer without a box is wrong.

    >>> accuracy([Box("a", 0, 0, 9, 9), Box("b", 0, 0, 9, 9)], [[Box("", 0, 0, 9, 9)], []])
    0.5
    """
    if len(wanted) != len(found) or not wanted:
        raise SeekVLError(f"accuracy needs as many answers as questions, not {len(found)} for {len(wanted)}")
    right = [bool(boxes) and iou(box, boxes[0]) >= least for box, boxes in zip(wanted, found, strict=True)]
    return sum(right) / len(right)


def _area(box: Box) -> int:
    return (box.x2 - box.x1) * (box.y2 - box.y1)


def _same(a: str, b: str) -> bool:
    return a.strip().casefold() == b.strip().casefold()


def _four(numbers: Sequence[float], *, form: str) -> tuple[float, float, float, float]:
    """Take four numbers, and refuse another count."""
    if len(numbers) != 4:
        raise SeekVLError(f"a box needs 4 numbers ({form}), not {len(numbers)}")
    a, b, c, d = (float(number) for number in numbers)
    return a, b, c, d


def _check_size(width: int, height: int) -> None:
    """Refuse a picture without pixels."""
    if width < 1 or height < 1:
        raise SeekVLError(f"a picture of {width}x{height} px has no room for boxes; sides are at least 1 px")


def _step(value: float, side: float, *, slack: float) -> int:
    """Return the step 0..999 nearest to a place on a side; up to `slack` outside is taken as the edge."""
    if not -slack <= value <= side + slack:  # written so that NaN is refused as well
        raise SeekVLError(f"a box reaches {value:g}, outside of its picture's side of 0 to {side:g}")
    return round(min(max(value, 0.0), side) / side * TOP)
