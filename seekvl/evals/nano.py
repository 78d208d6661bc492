"""How well seekvl-nano sees: accuracy by kind of question on freshly drawn pictures it has never seen.

The metric is the share of questions answered exactly: but for blanks around it and the case of letters, the
answer is the canonical one; a word that is read counts only with its case; a box counts with an IoU of at
least 0.5. What draws the pictures is an argument, `seekvl.corpus.nano.sample`; this room draws nothing.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from seekvl.data.sample import Sample
from seekvl.processing.conversation import Conversation, Text
from seekvl.processing.grounding import iou, parse_boxes
from seekvl.runtime import SeekVLError

LEAST_IOU = 0.5


class Draw(Protocol):
    """What draws samples: a pure function of seed and index, with a side of seeds held out from training."""

    def __call__(self, seed: int, index: int, *, kind: str | None, held_out: bool, questions: int) -> Sample:
        """Draw the sample of a seed and index."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question with the right answer."""

    id: str
    """Name of the sample it came from."""
    kind: str
    """Kind of question, a key of `SCORES`."""
    conversation: Conversation
    """The pictures and the question, without the answer."""
    expected: str
    """The canonical answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The result of one kind of question."""

    kind: str
    """Kind of question."""
    n: int
    """Number of questions asked."""
    accuracy: float
    """Share answered right, 0 to 1."""

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy: the root of p (1 - p) / n."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of an evaluation."""

    seed: int
    """Seed the pictures were drawn with."""
    rows: tuple[Row, ...]
    """One row for each kind."""

    def table(self) -> str:
        """Write the rows as a Markdown table, in percent."""
        lines = ["| question | n | accuracy | standard error |", "|---|---:|---:|---:|"]
        lines += [
            f"| {row.kind} | {row.n} | {100 * row.accuracy:.1f} % | {100 * row.standard_error:.1f} % |"
            for row in self.rows
        ]
        return "\n".join(lines)

    def json(self) -> str:
        """Write the rows as one line of JSON."""
        rows = {
            row.kind: {"n": row.n, "accuracy": row.accuracy, "standard_error": row.standard_error}
            for row in self.rows
        }
        return json.dumps({"seed": self.seed, "kinds": rows})


def examples(draw: Draw, kind: str, *, n: int, seed: int) -> list[Example]:
    """Draw n pictures from the held-out side with one question of a kind about each.

    Raises SeekVLError for an unknown kind or n below 1.
    """
    if kind not in SCORES:
        raise SeekVLError(f"kind {kind!r} cannot be measured; use one of {', '.join(SCORES)}")
    if n < 1:
        raise SeekVLError(f"n is {n}: ask at least one question of each kind")
    return [
        _example(draw(seed, index, kind=kind, held_out=True, questions=1), kind=kind) for index in range(n)
    ]


def _example(sample: Sample, *, kind: str) -> Example:
    """Part a sample into question and answer."""
    *asked, answer = sample.conversation.messages
    expected = "".join(part.text for part in answer.parts if isinstance(part, Text))
    conversation = Conversation(tuple(asked), system=sample.conversation.system)
    return Example(id=sample.id, kind=kind, conversation=conversation, expected=expected)


def score(example: Example, answer: str) -> float:
    """Score one answer, 0 to 1."""
    return SCORES[example.kind](example.expected, answer)


def same_words(expected: str, answer: str) -> float:
    """1 for the same text but for blanks around it and the case of letters, else 0.

    >>> same_words("red circle", " Red circle"), same_words("3", "30")
    (1.0, 0.0)
    """
    return float(expected.strip().lower() == answer.strip().lower())


def same_letters(expected: str, answer: str) -> float:
    """1 for the same text but for blanks around it, else 0.

    >>> same_letters("STOP", "STOP "), same_letters("STOP", "Stop")
    (1.0, 0.0)
    """
    return float(expected.strip() == answer.strip())


def same_box(expected: str, answer: str) -> float:
    """1 where the answer holds exactly one box, with an IoU of at least 0.5 with the expected one, else 0."""
    wanted, found = parse_boxes(expected), parse_boxes(answer)
    if len(wanted) != 1:
        raise SeekVLError(
            f"the expected answer {expected!r} holds {len(wanted)} boxes; an example needs exactly 1"
        )
    return float(len(found) == 1 and iou(wanted[0], found[0]) >= LEAST_IOU)


def evaluate(
    answer: Callable[[list[Conversation]], Sequence[str]],
    draw: Draw,
    *,
    n: int,
    seed: int,
    kinds: Sequence[str] | None = None,
    batch: int = 64,
) -> Report:
    """Ask n questions of each kind (of `KINDS` when None), `batch` at a time, and report the accuracies.

    Raises SeekVLError when `answer` returns another number of answers than it got questions.
    """
    rows = []
    for kind in KINDS if kinds is None else kinds:
        asked = examples(draw, kind, n=n, seed=seed)
        total = 0.0
        for start in range(0, n, batch):
            some = asked[start : start + batch]
            said = answer([one.conversation for one in some])
            if len(said) != len(some):
                raise SeekVLError(
                    f"{len(some)} questions of kind {kind!r} got {len(said)} answers; give one for each"
                )
            total += sum(score(one, text) for one, text in zip(some, said, strict=True))
        rows.append(Row(kind=kind, n=n, accuracy=total / n))
    return Report(seed=seed, rows=tuple(rows))


SCORES: dict[str, Callable[[str, str], float]] = {
    "colour": same_words,
    "shape": same_words,
    "count": same_words,
    "locate": same_box,
    "read": same_letters,
    "relation": same_words,
    "size": same_words,
    "exist": same_words,
    "chart": same_words,
    "caption": same_words,
    "two_pictures": same_words,
    "small_print": same_letters,
    "small_locate": same_box,
    "small_count": same_words,
    "small_colour": same_words,
}
"""How each kind of question is scored."""

KINDS = tuple(kind for kind in SCORES if not kind.startswith("small_"))
"""Kinds that are asked when none is named: all but those about small print in long pictures, which are made
for models that cut them into tiles.
"""
