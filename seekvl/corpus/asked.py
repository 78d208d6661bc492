"""One question about a picture with its one right answer, and how places are written in both."""

import random
from dataclasses import dataclass

from seekvl.corpus.phrases import ASK
from seekvl.corpus.scene import Bounds, Drawn, Scene
from seekvl.processing.grounding import TOP, format_box


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question and its one right answer."""

    kind: str
    """The kind of question, a key of `seekvl.corpus.questions.QUESTIONS`."""
    question: str
    """What the user says."""
    answer: str
    """What the assistant says, in its canonical form."""
    about: str
    """What is asked, apart from wording; a conversation asks each at most once."""
    spoiler: str = ""
    """Words that give the answer away, if not empty: the pair is skipped where they were said before."""


def grid_box(box: Bounds, width: int, height: int) -> tuple[int, int, int, int]:
    """Bring a box in px to the whole numbers 0..999 of grounding.

    >>> grid_box((0.0, 25.0, 200.0, 100.0), 200, 100)
    (0, 250, 999, 999)
    """
    x1, y1, x2, y2 = box
    return (
        round(x1 / width * TOP), round(y1 / height * TOP), round(x2 / width * TOP), round(y2 / height * TOP)
    )  # fmt: skip


def box_answer(scene: Scene, thing: Drawn) -> str:
    """Write where a thing is, as a model answers."""
    return format_box(thing.name, [grid_box(thing.box, *scene.image.size)])


def ask(
    kind: str, template: str, rng: random.Random, *, about: str, answer: str, spoiler: str = "", **words: str
) -> Asked:
    """Fill one wording of a template."""
    question = rng.choice(ASK[template]).format(**words)
    return Asked(kind=kind, question=question, answer=answer, about=about, spoiler=spoiler)
