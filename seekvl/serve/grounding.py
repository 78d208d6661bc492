"""Boxes of an answer as data, and the answer without their marks, also while it is still growing."""

import re
from collections.abc import Sequence

from seekvl.engine.reply import unfinished
from seekvl.processing.grounding import parse_boxes
from seekvl.processing.tokenizer import GROUNDING_MARKS

REF, REF_END, DET, DET_END, _ = map(re.escape, GROUNDING_MARKS)
TAGGED = re.compile(rf"(?:{REF}(?P<label>.*?){REF_END}\s*)?{DET}.*?(?:{DET_END}|$)", re.DOTALL)
"""A label with its boxes, or boxes alone."""
HIDDEN = re.compile(rf"{DET}.*?(?:{DET_END}|$)|{'|'.join(map(re.escape, GROUNDING_MARKS))}", re.DOTALL)
"""What goes when marks are stripped: coordinates with their marks, and the marks of labels."""

Grounding = list[dict[str, object]]


class Stripper:
    """Takes an answer piece by piece and gives it back without marks and coordinates.

    >>> stripper = Stripper()
    >>> [stripper.push(piece) for piece in ("a <|re", "f|>dog<|/ref|><|det|>[[1, 2", ", 3, 4]]<|/det|>.")]
    ['a ', 'dog', '.']
    """

    def __init__(self) -> None:
        self._raw = ""
        self._given = 0

    def push(self, piece: str, *, last: bool = False) -> str:
        """Return the letters that are final now; with `last` those that were held back, too."""
        self._raw += piece
        held = 0 if last else unfinished(self._raw, GROUNDING_MARKS)
        visible = strip(self._raw[: len(self._raw) - held])
        new, self._given = visible[self._given :], max(self._given, len(visible))
        return new


def strip(text: str) -> str:
    """Return a text without marks and coordinates; labels stay.

    >>> strip("It is <|ref|>the dog<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>.")
    'It is the dog.'
    """
    return HIDDEN.sub("", text)


def grounding(text: str, *, sizes: Sequence[tuple[int, int]], stripped: bool) -> Grounding:
    """Return the boxes of an answer, each with the letters of the answer that it belongs to.

    sizes: width and height in px of the pictures; boxes lie in the last one. stripped: places are those in
    the text without marks, and enclose the label. Boxes that the tolerant parser finds in another order than
    they stand have no place.
    """
    image = max(0, len(sizes) - 1)
    every = parse_boxes(text, image=image)
    placed = [
        (box, _place(found, text, stripped=stripped))
        for found in TAGGED.finditer(text)
        for box in parse_boxes(found[0], image=image)
    ]
    if [box for box, _ in placed] != every:
        placed = [(box, {}) for box in every]
    return [
        {
            "label": box.label,
            "image": box.image,
            "box": list(box.corners),
            **({"box_px": list(box.pixels(*sizes[image]))} if sizes else {}),
            **place,
        }
        for box, place in placed
    ]


def _place(found: re.Match[str], text: str, *, stripped: bool) -> dict[str, int]:
    """Return first letter and end of a tagged stretch, or of its label in the stripped text."""
    if not stripped:
        return {"start": found.start(), "end": found.end()}
    start = len(strip(text[: found.start()]))
    return {"start": start, "end": start + len(strip(found["label"] or ""))}
