"""Questions about a drawn scene, with answers that are true by construction.

Each kind is a function from a scene to all pairs it can ask there; a pair is only made where the answer is
beyond doubt: the thing meant is the only one of its name, directions and sizes differ clearly.
"""

import random
from collections.abc import Callable, Sequence
from itertools import combinations, permutations

from seekvl.corpus.asked import Asked, ask, box_answer
from seekvl.corpus.phrases import NUMBERS, PLURALS, article, enumerate_words
from seekvl.corpus.scene import COLOURS, Drawn, Scene
from seekvl.corpus.shapes import SHAPES
from seekvl.corpus.small_print import (
    ask_small_colour,
    ask_small_count,
    ask_small_letters,
    ask_small_locate,
    ask_small_print,
    ask_small_text,
    strip_caption,
)

APART = 0.15
"""Least distance of two centres for a direction, as a share of the picture's longer side."""
LARGER = 1.4
"""Least ratio of the extents of two things for one to be called larger."""


def questions(scene: Scene, rng: random.Random, *, kind: str) -> list[Asked]:
    """Ask everything of one kind that this scene answers, each in one of its wordings."""
    return QUESTIONS[kind](scene, rng)


def caption(scene: Scene) -> str:
    """Describe a scene in one canonical sentence, things from left to right; crowds are only counted."""
    if scene.style == "strip":
        return strip_caption(scene)
    ground = f"on a {scene.background} background"
    if scene.style == "chart":
        names = enumerate_words([bar.colour for bar in scene.of("bar")])
        return f"A bar chart with {NUMBERS[len(scene.objects)].lower()} bars: {names}."
    things = sorted(scene.shapes, key=lambda thing: thing.box[0] + thing.box[2])
    named = [article(_sized(thing)) for thing in things]
    if scene.style == "sign":
        signs = scene.of("sign")
        board = article(f"{signs[0].colour} sign that says") if signs else "the word"
        named.insert(0, f"{board} {scene.word}")
    if len(things) > 3:
        return f"{NUMBERS[len(things)]} objects {ground}."
    return f"{enumerate_words(named)} {ground}.".replace(named[0], named[0][0].upper() + named[0][1:], 1)


def _sized(thing: Drawn) -> str:
    """Name a shape, with its size unless that is medium."""
    return thing.name if thing.size == "medium" else f"{thing.size} {thing.name}"


def _only(things: Sequence[Drawn], thing: Drawn, field: str) -> bool:
    """Whether no other thing has the same colour, shape or name."""
    return [getattr(other, field) for other in things].count(getattr(thing, field)) == 1


def _coloured(scene: Scene) -> tuple[Drawn, ...]:
    """List the things whose colour could be meant by "the red object"."""
    return tuple(thing for thing in scene.objects if thing.kind in ("shape", "sign", "text"))


def _unique(scene: Scene) -> list[Drawn]:
    """List the shapes that are the only ones of their name."""
    return [thing for thing in scene.shapes if _only(scene.shapes, thing, "name")]


def _single(scene: Scene, kind: str) -> tuple[Drawn, ...]:
    """List the only thing of a kind, such as what "the sign" means, or none where there are several."""
    things = scene.of(kind)
    return things if len(things) == 1 else ()


def _panels(scene: Scene) -> list[Drawn]:
    """List the signs and panels that are the only ones of their name."""
    return [thing for thing in scene.of("sign") if _only(scene.of("sign"), thing, "name")]


def _extent(thing: Drawn) -> float:
    """Side in px of the square with the area of a thing's box."""
    x1, y1, x2, y2 = thing.box
    return float(((x2 - x1) * (y2 - y1)) ** 0.5)


def ask_colour(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the colour of the only thing of a shape, of the sign, of the word."""
    asked = [
        ask(
            "colour",
            "colour",
            rng,
            about=f"look {thing.name}",
            answer=thing.colour,
            spoiler=thing.name,
            thing=thing.shape,
        )
        for thing in scene.shapes
        if _only(scene.shapes, thing, "shape")
    ]
    for thing in (*_single(scene, "sign"), *_single(scene, "text")):
        word = "sign" if thing.kind == "sign" else rng.choice(("word", "text"))
        asked.append(
            ask("colour", "colour", rng, about=f"colour {thing.kind}", answer=thing.colour, thing=word)
        )
    return asked


def ask_background(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the colour of the background."""
    return [ask("background", "background", rng, about="background", answer=scene.background)]


def ask_shape(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the shape of the only thing of a colour."""
    return [
        ask(
            "shape",
            "shape",
            rng,
            about=f"look {thing.name}",
            answer=thing.shape,
            spoiler=thing.name,
            colour=thing.colour,
        )
        for thing in scene.shapes
        if _only(_coloured(scene), thing, "colour")
    ]


def ask_count(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the number of shapes, of all or one sort or colour; seldom of what is alone or not there."""
    if scene.style != "shapes":
        return []
    shapes = scene.shapes
    several = [ask("count", "count", rng, about="count all", answer=str(len(shapes)))]
    single: list[Asked] = []
    names = {name: sum(thing.shape == name for thing in shapes) for name in SHAPES}
    colours = {colour: sum(thing.colour == colour for thing in shapes) for colour in COLOURS}
    for name, number in names.items():
        one = ask(
            "count", "count shape", rng, about=f"count {name}", answer=str(number), things=PLURALS[name]
        )
        (several if number > 1 else single).append(one)
    for colour, number in colours.items():
        one = ask("count", "count colour", rng, about=f"count {colour}", answer=str(number), colour=colour)
        (several if number > 1 else single).append(one)
    alone = [one for one in single if one.answer == "1"]
    absent = [one for one in single if one.answer == "0"]
    return (
        several
        + rng.sample(alone, min(1, len(alone)))
        + (rng.sample(absent, 1) if rng.random() < 0.12 else [])
    )


def ask_locate(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the box of each thing that is the only one of its name; seldom of a thing that is not there."""
    asked = [
        ask(
            "locate",
            "locate",
            rng,
            about=f"locate {thing.name}",
            answer=box_answer(scene, thing),
            thing=thing.name,
        )
        for thing in (*_unique(scene), *scene.of("bar"), *_panels(scene))
    ]
    for thing in _single(scene, "text"):
        named = f"word {thing.name}"
        asked.append(
            ask("locate", "locate", rng, about="locate text", answer=box_answer(scene, thing), thing=named)
        )
    return asked


def ask_absent(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the box of a shape that is not there."""
    name = _missing(scene, rng)
    return [ask("absent", "locate", rng, about=f"locate {name}", answer=f"There is no {name}.", thing=name)]


def ask_region(scene: Scene, rng: random.Random) -> list[Asked]:
    """Give the box of a shape or bar and ask what it is."""
    return [
        ask(
            "region",
            "region",
            rng,
            about=f"locate {thing.name}",
            answer=thing.name,
            box=_coordinates(scene, thing),
        )
        for thing in (*scene.shapes, *scene.of("bar"))
    ]


def _coordinates(scene: Scene, thing: Drawn) -> str:
    """Write the box of a thing as it stands in a question."""
    return box_answer(scene, thing).partition("<|/ref|>")[2]


def _missing(scene: Scene, rng: random.Random) -> str:
    """Name a shape that is not there; two in three share their colour or their shape with one that is."""
    present = {thing.name for thing in scene.shapes}
    while True:
        colour, shape = rng.choice(tuple(COLOURS)), rng.choice(tuple(SHAPES))
        if present and rng.random() < 0.67:
            near = rng.choice(scene.shapes)
            colour, shape = (near.colour, shape) if rng.random() < 0.5 else (colour, near.shape)
        if f"{colour} {shape}" not in present:
            return f"{colour} {shape}"


def ask_exist(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask whether something is there: as often "Yes" as "No"."""
    asked = []
    for thing in scene.shapes[:3] or (None,):
        present = thing is not None and rng.random() < 0.5
        name = thing.name if present and thing is not None else _missing(scene, rng)
        answer = "Yes" if present else "No"
        asked.append(ask("exist", "exist", rng, about=f"exist {name}", answer=answer, thing=article(name)))
    if scene.style == "shapes":
        present = rng.random() < 0.5
        shapes = {thing.shape for thing in scene.shapes}
        word = rng.choice([name for name in SHAPES if (name in shapes) == present])
        answer = "Yes" if present else "No"
        asked.append(ask("exist", "exist", rng, about=f"exist {word}", answer=answer, thing=article(word)))
    return asked


def ask_read(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask what is written."""
    if not scene.word:
        return []
    template = "read" if scene.of("sign") else "read bare"
    return [ask("read", template, rng, about="read", answer=scene.word, spoiler=scene.word)]


def ask_letters(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the letters of the word one by one, the first, the last, and how many there are."""
    if not scene.word:
        return []
    word = scene.word
    answers = {
        "spell": " ".join(word),
        "first letter": word[0],
        "last letter": word[-1],
        "letters": str(len(word)),
    }
    return [
        ask("letters", template, rng, about=template, answer=answer, spoiler=word)
        for template, answer in answers.items()
    ]


def _direction(a: Drawn, b: Drawn, apart: float) -> list[str]:
    """On which sides of `b` the thing `a` clearly lies."""
    dx = (a.box[0] + a.box[2] - b.box[0] - b.box[2]) / 2
    dy = (a.box[1] + a.box[3] - b.box[1] - b.box[3]) / 2
    sides = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return [side for side, far in sides.items() if far >= apart]


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def ask_relation(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask whether one thing lies on a side of another (as often "Yes" as "No"), and what does."""
    apart = APART * max(scene.image.size)
    asked = []
    for a, b in permutations(_unique(scene), 2):
        for side in _direction(a, b, apart):
            answer, said = ("Yes", side) if rng.random() < 0.5 else ("No", OPPOSITE[side])
            asked.append(
                ask(
                    "relation", "relation", rng, about=f"relation {a.name} {b.name}", answer=answer,
                    a=a.name, b=b.name, side=said,
                )
            )  # fmt: skip
    if scene.style != "shapes":
        return asked
    for b in _unique(scene):
        for side in OPPOSITE:
            clear = [a for a in scene.shapes if a is not b and side in _direction(a, b, apart)]
            perhaps = [a for a in scene.shapes if a is not b and side in _direction(a, b, 0.1 * apart)]
            if len(clear) == len(perhaps) == 1:
                asked.append(
                    ask(
                        "relation", "what is", rng, about=f"what {side} {b.name}", answer=clear[0].name,
                        b=b.name, side="to the " + side if side.endswith("of") else side,
                    )
                )  # fmt: skip
    return asked


def ask_position(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask which shape is outermost on a side, where one clearly is."""
    if scene.style != "shapes" or len(scene.shapes) < 2:
        return []
    apart = APART * max(scene.image.size)
    asked = []
    for side in OPPOSITE:
        for thing in scene.shapes:
            if all(other is thing or side in _direction(thing, other, apart) for other in scene.shapes):
                asked.append(ask("position", f"outermost {side}", rng, about=side, answer=thing.name))
    return asked


def ask_size(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask which of two shapes is larger or smaller, and whether a shape is small or large."""
    asked = []
    for a, b in combinations(_unique(scene), 2):
        large, small = (a, b) if _extent(a) > _extent(b) else (b, a)
        if _extent(large) < LARGER * _extent(small):
            continue
        one, two = rng.sample((a, b), 2)
        template, answer = rng.choice((("larger", large.name), ("smaller", small.name)))
        asked.append(
            ask("size", template, rng, about=f"size {a.name} {b.name}", answer=answer, a=one.name, b=two.name)
        )
    return asked


def ask_chart(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the tallest and the shortest bar, their number, labels, and which of two is taller."""
    bars = scene.of("bar")
    if not bars:
        return []
    ranked = sorted(bars, key=lambda bar: bar.box[1])
    asked = [
        ask("chart", "tallest", rng, about="tallest", answer=ranked[0].colour),
        ask("chart", "shortest", rng, about="shortest", answer=ranked[-1].colour),
        ask("chart", "bars", rng, about="bars", answer=str(len(bars))),
    ]
    for bar in bars:
        if bar.shape:
            asked.append(
                ask("chart", "bar colour", rng, about=f"bar {bar.shape}", answer=bar.colour, label=bar.shape)
            )
            asked.append(
                ask(
                    "chart", "bar label", rng, about=f"label {bar.shape}", answer=bar.shape, colour=bar.colour
                )
            )
    a, b = rng.sample(bars, 2)
    answer = "Yes" if a.box[1] < b.box[1] else "No"
    asked.append(ask("chart", "taller", rng, about="taller", answer=answer, a=a.colour, b=b.colour))
    return asked


def ask_caption(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for a description of the whole picture."""
    return [ask("caption", "caption", rng, about="caption", answer=caption(scene))]


QUESTIONS: dict[str, Callable[[Scene, random.Random], list[Asked]]] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "locate": ask_locate,
    "read": ask_read,
    "relation": ask_relation,
    "size": ask_size,
    "exist": ask_exist,
    "chart": ask_chart,
    "caption": ask_caption,
    "absent": ask_absent,
    "background": ask_background,
    "letters": ask_letters,
    "position": ask_position,
    "region": ask_region,
    "small_print": ask_small_print,
    "small_locate": ask_small_locate,
    "small_count": ask_small_count,
    "small_colour": ask_small_colour,
    "small_letters": ask_small_letters,
    "small_text": ask_small_text,
}
"""Every kind of question about one picture."""
