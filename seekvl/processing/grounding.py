"""The grounding toolkit: prompts that ask where, answers that say where (2412.10302, sec. 3).

    <|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], [x1, y1, x2, y2]]<|/det|>

Boxes as data are at home in `boxes`, drawing in `draw`; this module hands their names on, so that it is the
whole toolkit. What the parsers make of every kind of malformed answer is the table of docs/grounding.md.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NoReturn

from seekvl.processing.boxes import TOP, Box, Matches, Pair, accuracy, iou, match
from seekvl.processing.draw import draw_boxes, mark_object, svg_boxes
from seekvl.processing.tokenizer import GROUNDING_MARKS
from seekvl.runtime import SeekVLError

__all__ = [
    "TOP",
    "Box",
    "Matches",
    "Pair",
    "accuracy",
    "draw_boxes",
    "format_box",
    "format_boxes",
    "grounded",
    "in_context",
    "iou",
    "mark_object",
    "match",
    "parse_boxes",
    "refer",
    "strip_marks",
    "svg_boxes",
]

REF, REF_END, DET, DET_END, GROUNDING = GROUNDING_MARKS
MARK = re.compile("|".join(map(re.escape, GROUNDING_MARKS)))
INNERMOST = re.compile(r"\[([^\[\]]*)\]")
NUMBER = re.compile(r"\s*([+-]?[0-9]{1,9}(?:\.[0-9]*)?)\s*")
COORDINATE = re.compile(r"(?:0|[1-9][0-9]{0,2})(?![0-9.])")


def refer(phrase: str, *, question: str = "{}.") -> str:
    """Ask for the box of what a phrase names; `question` holds {} where the marked phrase goes.

    Wordings that the published examples use: "{}.", "Locate {} in the given image.", "Find all the {}."

    Raises SeekVLError for an empty phrase, one with marks or line breaks, and a question without its one {}.

    >>> refer("the dog", question="Locate {} in the given image.")
    'Locate <|ref|>the dog<|/ref|> in the given image.'
    """
    _check_label(phrase, what="phrase")
    if not phrase.strip():
        raise SeekVLError("the phrase is empty: name what is to be found")
    before, gap, after = question.partition("{}")
    if not gap or "{}" in after:
        raise SeekVLError(f"the question {question!r} must hold {{}} once, where the phrase goes")
    _check_marks(before + after, what="question")
    return f"{before}{REF}{phrase}{REF_END}{after}"


def grounded(question: str) -> str:
    """Ask for an answer that gives the boxes of the things it speaks of.

    Raises SeekVLError for an empty question and one that holds this mark already.

    >>> grounded("What stands on the table?")
    '<|grounding|>What stands on the table?'
    """
    if not question.strip():
        raise SeekVLError("the question is empty")
    if GROUNDING in question:
        raise SeekVLError(f"the question {question!r} holds {GROUNDING} already")
    return GROUNDING + question


def in_context(
    *,
    marked: str = "an object within the red rectangle",
    wanted: str = "the object of the same category",
) -> str:
    """Ask about the second of two pictures by pointing at something in the first; see `mark_object`.

    >>> in_context(wanted="the same dog").partition(". ")[2]
    'Locate the same dog in the second image.'
    """
    for words, what in ((marked, "marked"), (wanted, "wanted")):
        _check_label(words, what=what)
        if not words.strip():
            raise SeekVLError(f"{what} is empty: say it in words")
    return grounded(f"In the first image, {marked} is marked. Locate {wanted} in the second image.")


def format_box(label: str, boxes: Sequence[Box | tuple[int, int, int, int]]) -> str:
    """Write the boxes of one label as a model does.

    Raises SeekVLError without boxes, for impossible ones, and for a label that no strict parser would read.

    >>> format_box("dog", [(1, 2, 3, 4)])
    '<|ref|>dog<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>'
    """
    if not boxes:
        raise SeekVLError(f"no boxes for {label!r}: give at least one")
    _check_label(label, what="label")
    checked = [box if isinstance(box, Box) else Box(label, *box) for box in boxes]
    inner = ", ".join(f"[{box.x1}, {box.y1}, {box.x2}, {box.y2}]" for box in checked)
    return f"{REF}{label}{REF_END}{DET}[{inner}]{DET_END}"


def format_boxes(boxes: Sequence[Box]) -> str:
    """Write boxes as a model is taught to answer: neighbours with the same label share a list.

    `parse_boxes(..., strict=True)` is the inverse, but for the indices of pictures.

    >>> format_boxes([Box("dog", 1, 2, 3, 4), Box("cat", 5, 6, 7, 8)]).count("<|ref|>")
    2
    """
    return "".join(format_box(label, list(group)) for label, group in groupby(boxes, lambda box: box.label))


def parse_boxes(text: str, *, image: int = 0, strict: bool = False) -> list[Box]:
    """Find the boxes in an answer, in order; one label may have several. `image` is the picture they are in.

    The tolerant way, for answers, never raises: it keeps what can be kept, sorts corners, cuts at 0 and 999,
    rounds fractions, takes the first four of more numbers, and leaves out what is no box. The strict way, for
    training data, raises SeekVLError naming the first letter that is not as a model should write it.

    >>> parse_boxes("a <|ref|>dog<|/ref|><|det|>[[1, 2, 3, 4], [9, 9, 1, 1200]]<|/det|>")[1]
    Box(label='dog', x1=1, y1=9, x2=9, y2=999, image=0)
    """
    if strict:
        return list(_Reader(text).boxes(image))
    return [
        Box(label, *corners, image)
        for label, inner in _labelled(_spans(text))
        for corners in map(_corners, INNERMOST.findall(inner))
        if corners is not None
    ]


def strip_marks(text: str) -> str:
    """Make an answer readable: labels stay, marks and coordinates go.

    >>> strip_marks("It is <|ref|>the dog<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>.")
    'It is the dog.'
    """
    # the look behind starts a search at the first of many blanks only: without it their square is searched
    without = re.sub(r"(?<!\s)\s*<\|det\|>.*?(<\|/det\|>|$)", "", text, flags=re.DOTALL)
    return MARK.sub("", without).strip()


@dataclass(slots=True)
class _Span:
    """What stands after <|ref|> or <|det|>, up to its end."""

    mark: str
    text: str = ""


def _spans(text: str) -> list[_Span]:
    """Cut an answer into its labels and lists, in order; a new one ends the one before, if it was left open.

    A list that is open at the end of the text counts, for its boxes are whole; a label that is open does not.
    """
    spans: list[_Span] = []
    inside = ""
    pieces = re.split(f"({MARK.pattern})", text)
    for mark, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if mark in (REF, DET) and mark != inside:  # a mark that is repeated inside its own span says nothing
            spans.append(_Span(mark))
            inside = mark
        elif (mark, inside) in ((REF_END, REF), (DET_END, DET)):
            inside = ""
        if inside:
            spans[-1].text += piece
    return spans[:-1] if inside == REF else spans


def _labelled(spans: Sequence[_Span]) -> list[tuple[str, str]]:
    """Give each list its label.

    As many labels as lists are paired in order, as the reference does. Else the label right before a list is
    its own, and a list that follows another one has none.
    """
    labels = [span.text for span in spans if span.mark == REF]
    lists = [span.text for span in spans if span.mark == DET]
    if len(labels) == len(lists):
        return list(zip(labels, lists, strict=True))
    pairs, label = [], ""
    for span in spans:
        if span.mark == DET:
            pairs.append((label, span.text))
        label = span.text if span.mark == REF else ""
    return pairs


def _corners(inner: str) -> tuple[int, int, int, int] | None:
    """Read what stands between two square brackets as a box, or tell that it is none."""
    numbers = [NUMBER.fullmatch(part) for part in inner.split(",", 4)[:4]]
    values = [float(number[1]) for number in numbers if number is not None]
    if len(values) < 4:
        return None
    (x1, x2), (y1, y2) = sorted(values[::2]), sorted(values[1::2])
    if x2 < 0 or y2 < 0 or x1 > TOP or y1 > TOP:
        return None  # wholly outside: cutting it would leave a line along an edge where nothing was meant
    left, top, right, bottom = (round(min(max(value, 0), TOP)) for value in (x1, y1, x2, y2))
    return left, top, right, bottom


class _Reader:
    """Reads an answer letter by letter, and raises at the first that is not as a model should write it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def boxes(self, image: int) -> Iterator[Box]:
        """Read the whole answer."""
        while found := MARK.search(self.text, self.at):
            self.at = found.start()
            if found[0] == GROUNDING:
                self.take(GROUNDING)
                continue
            label = self.label()
            self.take(DET)
            yield from self.entries(label, image)
            self.skip_blanks()
            self.take(DET_END)

    def label(self) -> str:
        """Read a label between its marks."""
        self.take(REF)
        start = self.at
        found = MARK.search(self.text, start)
        self.at = len(self.text) if found is None else found.start()
        label = self.text[start : self.at]
        if "\n" in label:
            self.at = start + label.index("\n")
            self.fail(f"{REF_END!r} (a label is one line)")
        self.take(REF_END)
        return label

    def entries(self, label: str, image: int) -> Iterator[Box]:
        """Read a list of at least one box."""
        self.peek("[")
        self.take("[")
        yield self.box(label, image)
        while self.peek(",", "]") == ",":
            self.take(",")
            yield self.box(label, image)
        self.take("]")

    def box(self, label: str, image: int) -> Box:
        """Read one box."""
        self.peek("[")
        start = self.at
        self.take("[")
        values = []
        for end in (",", ",", ",", "]"):
            values.append(self.coordinate())
            self.peek(end)
            self.take(end)
        x1, y1, x2, y2 = values
        if x1 > x2 or y1 > y2:
            self.at = start
            self.fail("a box with x1 <= x2 and y1 <= y2")
        return Box(label, x1, y1, x2, y2, image)

    def coordinate(self) -> int:
        """Read a coordinate."""
        self.skip_blanks()
        found = COORDINATE.match(self.text, self.at)
        if found is None:
            self.fail(f"a whole number from 0 to {TOP} without sign or leading zero")
        self.at = found.end()
        return int(found[0])

    def peek(self, *wanted: str) -> str:
        """Skip blanks and return which of the wanted letters stands next."""
        self.skip_blanks()
        letter = self.text[self.at : self.at + 1]
        if letter not in wanted:
            self.fail(" or ".join(map(repr, wanted)))
        return letter

    def take(self, wanted: str) -> None:
        """Pass what must stand here."""
        if not self.text.startswith(wanted, self.at):
            self.fail(repr(wanted))
        self.at += len(wanted)

    def skip_blanks(self) -> None:
        """Pass blanks, which may stand between the parts of a list."""
        while self.text.startswith(" ", self.at):
            self.at += 1

    def fail(self, wanted: str) -> NoReturn:
        """Name the place."""
        stands = repr(self.text[self.at : self.at + 16]) if self.at < len(self.text) else "its end"
        raise SeekVLError(f"letter {self.at + 1} of the answer: {wanted} must stand there, not {stands}")


def _check_label(label: str, *, what: str) -> None:
    """Refuse what could not be read back as a label."""
    _check_marks(label, what=what)
    if "\n" in label:
        raise SeekVLError(f"the {what} {label!r} holds a line break, which no label may; put a blank there")


def _check_marks(text: str, *, what: str) -> None:
    """Refuse text with marks of its own."""
    found = MARK.search(text)
    if found:
        raise SeekVLError(f"the {what} {text!r} holds the grounding mark {found[0]}; take it out")
