"""Questions about strips: words and numbers read where they stand, found where they are, and counted.

Nothing on a strip is written twice, so that a word or number names its place; what has a colour is only meant
by it where it is the only one of its kind.
"""

import random
from itertools import pairwise

from seekvl.corpus.asked import Asked, ask, box_answer
from seekvl.corpus.phrases import NUMBERS, ORDINALS, article, enumerate_words
from seekvl.corpus.scene import Drawn, Scene


def ask_small_print(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask what is written at a place, after or before a word, on a colour, beside a word or number."""
    return [
        *_ask_places(scene, rng),
        *_ask_neighbours(scene, rng),
        *_ask_marks(scene, rng),
        *_ask_numbers(scene, rng),
    ]


def ask_small_locate(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the box of each word and number."""
    asked = []
    for entry in scene.entries:
        for text in filter(None, (entry.text, entry.number)):
            template, slot = ("locate number", "number") if text.name.isdigit() else ("locate word", "word")
            asked.append(
                ask(
                    "small_locate", template, rng, about=f"locate {text.name}",
                    answer=box_answer(scene, text), **{slot: text.name},
                )
            )  # fmt: skip
    return asked


def ask_small_count(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask how many lines, words, panels or numbers there are."""
    if not scene.entries:
        return []
    things = {"banner": "panels", "ruler": "numbers"}.get(scene.layout or "", "words")
    if things == "words" and _is_tall(scene) and rng.random() < 0.7:
        things = "lines"
    return [ask("small_count", things, rng, about="count entries", answer=str(len(scene.entries)))]


def ask_small_colour(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the colour of the panel under a word, of the bullet before it, of the pointer at a number."""
    bullet = "bullet colour" if _is_tall(scene) else "bullet colour before"
    template = {"banner": "panel colour", "menu": bullet, "ruler": "pointer colour"}
    asked = []
    for i, entry in enumerate(scene.entries):
        if entry.mark:
            asked.append(
                ask(
                    "small_colour", template[scene.layout or ""], rng, about=f"mark {i}",
                    answer=entry.mark.colour, word=entry.text.name, shape=entry.mark.shape,
                )
            )  # fmt: skip
    return asked


def ask_small_letters(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the letters of the word at a place one by one, for the first, and for the last."""
    asked = []
    for i, entry in enumerate(scene.entries):
        word = entry.text.name
        if word.isdigit():
            continue
        answers = {
            "spell nth": " ".join(word),
            "first letter of nth": word[0],
            "last letter of nth": word[-1],
        }
        template, answer = rng.choice(tuple(answers.items()))
        asked.append(
            ask(
                "small_letters", template, rng, about=f"place {i}", answer=answer, spoiler=word,
                nth=_nth(scene, i, rng),
            )
        )  # fmt: skip
    return asked


def ask_small_text(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for everything written, with a comma between the entries; a number follows its word.

    The numbers of a ruler, which follow from each other, are not asked for.
    """
    if not scene.entries or scene.layout == "ruler":
        return []
    read = [" ".join(text.name for text in (one.text, one.number) if text) for one in scene.entries]
    return [ask("small_text", "all", rng, about="all", answer=", ".join(read), spoiler=read[0])]


def strip_caption(scene: Scene) -> str:
    """Describe a strip in one canonical sentence, without what is written."""
    count = NUMBERS[len(scene.entries)].lower()
    marks = [entry.mark for entry in scene.entries if entry.mark]
    colours = [mark.colour for mark in marks]
    if scene.layout == "banner":
        return f"A banner of {count} panels: {enumerate_words(colours)}."
    if scene.layout == "ruler":
        pointers = enumerate_words([article(mark.name) for mark in marks])
        return f"A ruler with {count} numbers and {pointers}."
    ground = f"on a {scene.background} background"
    if scene.layout == "menu":
        return f"A menu of {count} words {ground}: {enumerate_words(colours)}."
    return f"A {scene.layout} of {count} words {ground}."


def _is_tall(scene: Scene) -> bool:
    """Whether the entries stand below each other."""
    return scene.image.height > scene.image.width


def _nth(scene: Scene, place: int, rng: random.Random) -> str:
    """Name a place by its ordinal; the last one is mostly called so."""
    return "last" if place == len(scene.entries) - 1 and rng.random() < 0.7 else ORDINALS[place]


def _read(
    template: str, rng: random.Random, *, place: int, text: Drawn, about: str = "place", **words: str
) -> Asked:
    """Ask for the text of a place; a conversation asks for each place once.

    Only a word is given away where it was said before: digits stand in boxes, too.
    """
    spoiler = "" if text.name.isdigit() else text.name
    return ask(
        "small_print", template, rng, about=f"{about} {place}", answer=text.name, spoiler=spoiler, **words
    )


def _ask_places(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the text at each place by its ordinal."""
    asked = []
    for i, entry in enumerate(scene.entries):
        template = {"banner": "nth panel", "ruler": "nth number"}.get(scene.layout or "", "nth word")
        if scene.layout in ("list", "menu") and _is_tall(scene) and rng.random() < 0.5:
            template = "nth line"
        asked.append(_read(template, rng, place=i, text=entry.text, nth=_nth(scene, i, rng)))
    return asked


def _ask_neighbours(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the word after or before another; the numbers of a ruler follow from each other."""
    if scene.layout == "ruler":
        return []
    pairs = (("after", "before"), ("under", "over"))
    vertical = _is_tall(scene)
    asked = []
    for i, (one, two) in enumerate(pairwise(scene.entries)):
        after, before = pairs[vertical and rng.random() < 0.5]
        asked.append(_read(after, rng, place=i + 1, text=two.text, word=one.text.name))
        asked.append(_read(before, rng, place=i, text=one.text, word=two.text.name))
    return asked


def _ask_marks(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask what is on a panel, at a bullet or a pointer, where its colour is the only one of its kind.

    In a row a bullet has a word on either side; the one after it is its own.
    """
    bullet = "beside bullet" if _is_tall(scene) else "after bullet"
    template = {"banner": "on panel", "menu": bullet, "ruler": "at pointer"}
    names = [entry.mark.name for entry in scene.entries if entry.mark]
    return [
        _read(
            template[scene.layout or ""], rng, place=i, text=entry.text, about="mark",
            thing=entry.mark.name,
        )
        for i, entry in enumerate(scene.entries)
        if entry.mark and names.count(entry.mark.name) == 1
    ]  # fmt: skip


def _ask_numbers(scene: Scene, rng: random.Random) -> list[Asked]:
    """Ask for the number of each word in a table, or for the word of the number."""
    asks = ("number beside", "word beside") if _is_tall(scene) else ("number under", "word over")
    pairs = [(entry.text.name, entry.number.name) for entry in scene.entries if entry.number]
    return [_ask_pair(word, number, rng, asks=asks) for word, number in pairs]


def _ask_pair(word: str, number: str, rng: random.Random, *, asks: tuple[str, str]) -> Asked:
    """Ask for one of a word and its number by the other; two in three ask for the number."""
    about, (number_of, word_of) = f"pair {word}", asks
    if rng.random() < 0.67:
        spoiler = f"{word} {number}"  # as `ask_small_text` reads it; the digits alone stand in boxes, too
        return ask("small_print", number_of, rng, about=about, answer=number, spoiler=spoiler, word=word)
    return ask("small_print", word_of, rng, about=about, answer=word, spoiler=word, number=number)
