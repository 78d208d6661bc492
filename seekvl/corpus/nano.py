"""The corpus of seekvl-nano: drawn pictures with a conversation each, a pure function of seed and index."""

import math
import random
from dataclasses import asdict, astuple, dataclass
from typing import Literal

from PIL import Image

from seekvl.corpus.asked import Asked
from seekvl.corpus.charts import draw_chart
from seekvl.corpus.dialogue import text_sample
from seekvl.corpus.phrases import ASK, article
from seekvl.corpus.questions import QUESTIONS, questions
from seekvl.corpus.scene import Scene
from seekvl.corpus.shapes import MOST, draw_shapes
from seekvl.corpus.signs import draw_sign
from seekvl.corpus.strips import draw_strip
from seekvl.data.sample import Sample
from seekvl.processing.conversation import Conversation, Message, Part, Picture, Text
from seekvl.runtime import SeekVLError, seed_for

__all__ = ["KINDS", "MIXTURE", "SMALL_KINDS", "Mixture", "sample", "scene", "text_sample"]

SOURCE = "nano"

KINDS = (
    "colour", "shape", "count", "locate", "read", "relation", "size", "exist", "chart", "caption",
    "two_pictures",
)  # fmt: skip
"""Kinds of question that are measured on every model."""

SMALL_KINDS = ("small_print", "small_locate", "small_count", "small_colour")
"""Kinds of question about strips that are measured where they are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How often each style of picture is drawn, in shares of any sum.

    Raises SeekVLError for a share that is below 0 or not finite, and where all are 0.
    """

    shapes: float
    """One to six shapes."""
    sign: float
    """A word on a sign or bare."""
    chart: float
    """A bar chart."""
    strip: float
    """A long or tall picture with small print."""

    def __post_init__(self) -> None:
        for style, share in asdict(self).items():
            if not (math.isfinite(share) and share >= 0):
                raise SeekVLError(f"Mixture.{style} is {share}: a share is a finite number of at least 0")
        if not any(astuple(self)):
            raise SeekVLError("every share of the mixture is 0: give at least one style a share above 0")

    def shares(self, *, kind: str | None = None) -> dict[str, float]:
        """Return the share of each style that is drawn, or only of those that answer one kind of question.

        Where the mixture has none of the styles that answer it, they are all as likely: the kind is what was
        asked for.
        """
        answering = [style for style in WEIGHTS if kind is None or kind in WEIGHTS[style]]
        shares = {style: share for style, share in asdict(self).items() if share and style in answering}
        return shares or dict.fromkeys(answering, 1.0)


MIXTURE = Mixture(shapes=55, sign=33, chart=12, strip=0)
"""What is drawn, and measured, where nobody says otherwise, in percent; strips are for models with tiles."""

WEIGHTS = {
    "shapes": {
        "colour": 12, "shape": 26, "count": 22, "locate": 60, "relation": 10, "size": 6, "exist": 8,
        "caption": 7, "absent": 2, "background": 3, "position": 5, "region": 6,
    },
    "sign": {
        "read": 40, "letters": 16, "locate": 16, "colour": 16, "caption": 6, "background": 1, "shape": 2,
    },
    "chart": {"chart": 30, "locate": 8, "caption": 4, "region": 2},
    "strip": {
        "small_print": 46, "small_locate": 20, "small_count": 5, "small_colour": 8, "small_letters": 10,
        "small_text": 6, "locate": 5, "caption": 4,
    },
}  # fmt: skip
"""How often each kind is asked about each style, in shares."""

COUNTED = 5
"""Counting is measured from 1 to this."""


def scene(
    seed: int,
    index: int,
    *,
    style: str | None = None,
    held_out: bool = False,
    mixture: Mixture = MIXTURE,
) -> Scene:
    """Draw one picture and tell what is in it, without questions.

    style is "shapes", "sign", "chart" or "strip", or None for one of the mixture; held_out draws from the
    side of seeds and words that training never sees. Raises SeekVLError for another style.
    """
    rng = _stream("scene", seed, index, held_out=held_out)
    return _scene(rng, style=style or _style(rng, mixture), held_out=held_out)


def sample(
    seed: int,
    index: int,
    *,
    kind: str | None = None,
    held_out: bool = False,
    questions: int = 6,
    mixture: Mixture = MIXTURE,
) -> Sample:
    """Draw one picture, one time in ten two, and a conversation of up to `questions` turns about it.

    kind asks only questions of one kind; counts are then 1 to 5. held_out draws from the side of seeds and
    words that training never sees. mixture says how often each style is drawn, of those that answer the
    kind; two pictures are never strips.

    Raises SeekVLError for an unknown kind, an index below 0, no question.
    """
    if kind is not None and kind not in (*QUESTIONS, "two_pictures"):
        raise SeekVLError(f"kind {kind!r} is not known; use one of {', '.join((*QUESTIONS, 'two_pictures'))}")
    if questions < 1 or index < 0:
        raise SeekVLError(
            f"index {index}, questions {questions}: the index starts at 0, and one question is the least"
        )
    rng = _stream("sample", seed, index, held_out=held_out)
    scenes, asked = _draw_asked(rng, kind=kind, held_out=held_out, most=questions, mixture=mixture)
    side = "held-out" if held_out else "train"
    kinds = {one.kind for one in asked}
    return Sample(
        id=f"{side}-{seed}-{index}" + (f"-{kind}" if kind else ""),
        conversation=_converse(rng, [one.image for one in scenes], asked),
        source=SOURCE,
        kind=kinds.pop() if len(kinds) == 1 else "mixed",
    )


def _stream(purpose: str, seed: int, index: int, *, held_out: bool) -> random.Random:
    """Make the random stream of one sample."""
    return random.Random(seed_for(seed, SOURCE, purpose, "held-out" if held_out else "train", index))


def _style(rng: random.Random, mixture: Mixture, *, kind: str | None = None) -> str:
    """Draw a style of a mixture, or of those in it that answer a kind of question."""
    shares = mixture.shares(kind=kind)
    return rng.choices(tuple(shares), weights=tuple(shares.values()))[0]


def _scene(rng: random.Random, *, style: str, held_out: bool) -> Scene:
    """Draw a scene of a style."""
    if style == "shapes":
        return draw_shapes(rng)
    if style == "sign":
        return draw_sign(rng, held_out=held_out)
    if style == "chart":
        return draw_chart(rng)
    if style == "strip":
        return draw_strip(rng, held_out=held_out)
    raise SeekVLError(f"style {style!r} is not known; use one of {', '.join(WEIGHTS)}")


def _draw_asked(
    rng: random.Random, *, kind: str | None, held_out: bool, most: int, mixture: Mixture
) -> tuple[list[Scene], list[Asked]]:
    """Draw until there is something to ask, and choose what."""
    while True:
        if kind == "two_pictures" or (kind is None and rng.random() < 0.1):
            scenes = [_simple_scene(rng, held_out=held_out) for _ in range(2)]
            pairs = _distinct(rng, _ask_two(scenes, rng), most=most)
        elif kind is None:
            scenes = [_scene(rng, style=_style(rng, mixture), held_out=held_out)]
            pairs = _mixed(rng, scenes[0], most=most)
        elif kind == "count":
            scenes, pairs = _draw_counted(rng, most=most)
        else:
            scenes = [_scene(rng, style=_style(rng, mixture, kind=kind), held_out=held_out)]
            pairs = _distinct(rng, questions(scenes[0], rng, kind=kind), most=most)
        if pairs:
            return scenes, pairs


def _draw_counted(rng: random.Random, *, most: int) -> tuple[list[Scene], list[Asked]]:
    """Draw a scene for counting in which each number from 1 to 5 is as likely as another."""
    number = rng.randint(1, COUNTED)
    while True:
        if rng.random() < 0.5:
            drawn = draw_shapes(rng, count=number)
        else:
            by: Literal["shape", "colour"] = "shape" if rng.random() < 0.5 else "colour"
            drawn = draw_shapes(rng, count=rng.randint(number, MOST), alike=number, by=by)
        pairs = [one for one in questions(drawn, rng, kind="count") if 1 <= int(one.answer) <= COUNTED]
        right = [one for one in pairs if one.answer == str(number)]
        if right:
            first = rng.choice(right)
            rest = _distinct(rng, [one for one in pairs if one is not first], most=most - 1)
            return [drawn], [first, *rest]


def _simple_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Draw one of two pictures."""
    style = rng.choices(("shapes", "sign", "chart"), weights=(6, 3, 1))[0]
    return draw_shapes(rng, count=rng.randint(1, 4)) if style == "shapes" else _scene(
        rng, style=style, held_out=held_out
    )  # fmt: skip


def _mixed(rng: random.Random, drawn: Scene, *, most: int) -> list[Asked]:
    """Choose questions of many kinds by their weights, none twice and none that was given away before."""
    left = dict(WEIGHTS[drawn.style])
    pools: dict[str, list[Asked]] = {}
    chosen: list[Asked] = []
    seen: set[str] = set()
    said = ""
    while len(chosen) < most and left:
        kind = rng.choices(tuple(left), weights=tuple(left.values()))[0]
        if kind not in pools:
            pools[kind] = questions(drawn, rng, kind=kind)
            rng.shuffle(pools[kind])
        if not pools[kind]:
            del left[kind]
            continue
        one = pools[kind].pop()
        if one.about in seen or (one.spoiler and one.spoiler in said):
            continue
        seen.add(one.about)
        said += f"{one.question} {one.answer}\n"
        chosen.append(one)
    return chosen


def _distinct(rng: random.Random, pairs: list[Asked], *, most: int) -> list[Asked]:
    """Choose up to so many pairs that ask different things."""
    by_about = {one.about: one for one in rng.sample(pairs, len(pairs))}
    return list(by_about.values())[:most]


def _ask_two(scenes: list[Scene], rng: random.Random) -> list[Asked]:
    """Ask about two pictures: which of them, and things about one of them."""
    first, second = scenes
    pairs: list[Asked] = []

    def ask(template: str, about: str, answer: str, **words: str) -> None:
        """Add a question in one of its wordings."""
        question = rng.choice(ASK[template]).format(**words)
        pairs.append(Asked(kind="two_pictures", question=question, answer=answer, about=about))

    if first.style == second.style == "shapes" and len(first.shapes) != len(second.shapes):
        ask("more", "more", "first" if len(first.shapes) > len(second.shapes) else "second")
    for style, what in (("sign", "a word"), ("chart", "a chart")):
        if (first.style == style) != (second.style == style):
            one = first if first.style == style else second
            what = "a sign" if one.of("sign") else what
            ask("has", style, "first" if one is first else "second", thing=what)
    for which, one, other in (("first", first, second), ("second", second, first)):
        taken = {thing.shape for thing in other.shapes}
        for thing in one.shapes:
            if sum(thing.shape == same.shape for same in one.shapes) == 1:
                ask("colour of", f"{which} {thing.shape}", thing.colour, thing=thing.shape, which=which)
            if thing.shape not in taken:
                ask("has", f"has {thing.shape}", which, thing=article(thing.shape))
        if one.style == "shapes":
            ask("count of", f"{which} count", str(len(one.shapes)), which=which)
        if one.word:
            ask("read of", f"{which} read", one.word, which=which)
    return pairs


def _converse(rng: random.Random, images: list[Image.Image], asked: list[Asked]) -> Conversation:
    """Make a conversation: pictures and first question in the first turn, then one question a turn."""
    pictures: list[Part] = [Picture(image) for image in images]
    text: Part = Text(asked[0].question)
    if len(images) == 1:
        first = [*pictures, text] if rng.random() < 0.88 else [text, *pictures]
    elif rng.random() < 0.5:
        first = [*pictures, text]
    else:
        first = [Text("First: "), pictures[0], Text(" second: "), pictures[1], Text(" "), text]
    messages = []
    for turn, one in enumerate(asked):
        parts = tuple(first) if turn == 0 else (Text(one.question),)
        messages += [Message("user", parts), Message("assistant", (Text(one.answer),))]
    return Conversation(tuple(messages))
