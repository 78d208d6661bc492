"""Short dialogues without pictures, for the language warm-up: letters, numbers, colours, boxes, talk."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from seekvl.corpus.phrases import PLURALS, article, enumerate_words
from seekvl.corpus.scene import COLOURS
from seekvl.corpus.shapes import SHAPES
from seekvl.corpus.words import WORDS_TRAIN, random_letters
from seekvl.data.sample import Sample
from seekvl.processing.conversation import Conversation, Message, Text
from seekvl.processing.grounding import TOP, format_box
from seekvl.runtime import SeekVLError, seed_for

SOURCE = "nano-text"
NAME = "seekvl-nano"
"""Who speaks, unless a recipe says otherwise."""

SIDES = {
    "triangle": "3",
    "square": "4",
    "rectangle": "4",
    "diamond": "4",
    "pentagon": "5",
    "hexagon": "6",
    "circle": "0",
}

TYPICAL = {
    "green": ("grass", "a leaf", "a frog", "a cucumber"),
    "blue": ("the sky", "the sea"),
    "white": ("snow", "milk", "salt"),
    "black": ("coal", "the night", "tar"),
    "yellow": ("a banana", "the sun", "a lemon"),
    "red": ("blood", "a tomato", "a strawberry"),
    "orange": ("a carrot", "a pumpkin"),
    "purple": ("a plum", "a violet"),
}

OPPOSITES = tuple(
    tuple(pair.split())
    for pair in (
        "left right", "above below", "large small", "first last", "up down", "yes no", "tall short",
        "black white", "hot cold", "open closed", "more less", "day night", "top bottom", "near far",
        "light dark", "new old",
        "fast slow", "full empty",
    )
)  # fmt: skip

TALK = (
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am {name}, a tiny vision-language model.",
    ),
    (("Hello!", "Hi!", "Good morning!", "Hello there."), "Hello! Show me a picture and ask about it."),
    (("Thank you.", "Thanks!", "Thank you very much."), "You are welcome."),
    (("Goodbye.", "Bye!", "See you."), "Goodbye!"),
    (("How are you?", "Are you well?"), "I am well, thank you."),
    (
        ("What can you do?", "How can you help me?", "What do you know?"),
        "I name colours and shapes, count, find things, and read short words in pictures.",
    ),
    (("Can you see?", "Can you look at pictures?", "Do you understand pictures?"), "Yes, show me a picture."),
    (("Are you large?", "How big are you?", "How large are you?"), "I am a very small model."),
)

SPELL = ("Spell {word}.", "How is {word} spelled?", "Write {word} letter by letter.")


@dataclass(frozen=True, slots=True)
class Line:
    """What one side asks and the other answers."""

    question: str
    """What the user says."""
    answer: str
    """What the assistant says."""


def text_sample(
    seed: int, index: int, *, kind: str | None = None, turns: int = 4, name: str = NAME
) -> Sample:
    """Make a dialogue of one to `turns` turns about words, numbers, colours or boxes.

    kind keeps to one of `DIALOGUES`. name is what the model calls itself; nothing else depends on it. Raises
    SeekVLError for an unknown kind, an index below 0, no turn.
    """
    if kind is not None and kind not in DIALOGUES:
        raise SeekVLError(f"kind {kind!r} is not known; use one of {', '.join(DIALOGUES)}")
    if turns < 1 or index < 0:
        raise SeekVLError(f"index {index}, turns {turns}: the index starts at 0, and one turn is the least")
    rng = random.Random(seed_for(seed, SOURCE, kind or "", index))
    messages = []
    for _ in range(rng.randint(1, turns)):
        drawn = kind or rng.choice(tuple(DIALOGUES))
        line = talk(rng, name=name) if drawn == "talk" else DIALOGUES[drawn](rng)
        messages += [Message("user", (Text(line.question),)), Message("assistant", (Text(line.answer),))]
    return Sample(
        id=f"text-{seed}-{index}" + (f"-{kind}" if kind else ""),
        conversation=Conversation(tuple(messages)),
        source=SOURCE,
        kind=kind or "text",
    )


def _word(rng: random.Random) -> str:
    """Draw a word or letters, all capitals."""
    return rng.choice(WORDS_TRAIN) if rng.random() < 0.5 else random_letters(rng, rng.randint(2, 6))


def _thing(rng: random.Random) -> str:
    """Draw the name of a shape."""
    return f"{rng.choice(tuple(COLOURS))} {rng.choice(tuple(SHAPES))}"


def _corners(rng: random.Random) -> tuple[int, int, int, int]:
    """Draw the corners of a box."""
    x1, y1 = rng.randint(0, TOP - 100), rng.randint(0, TOP - 100)
    return x1, y1, rng.randint(x1 + 50, TOP), rng.randint(y1 + 50, TOP)


def _det(corners: tuple[int, int, int, int]) -> str:
    """Write a box without a label, as it stands in questions."""
    return format_box("", [corners]).partition("<|/ref|>")[2]


def spell(rng: random.Random) -> Line:
    """Ask for a word letter by letter."""
    word = _word(rng)
    return Line(rng.choice(SPELL).format(word=word), " ".join(word))


def join(rng: random.Random) -> Line:
    """Ask for letters made into a word."""
    word = _word(rng)
    ask = rng.choice(("Which word is {it}?", "Join the letters {it}.", "Write {it} as one word."))
    return Line(ask.format(it=" ".join(word)), word)


def copy(rng: random.Random) -> Line:
    """Ask for words said again."""
    words = " ".join(rng.choice((_word, _thing))(rng) for _ in range(rng.randint(1, 3)))
    return Line(rng.choice(("Repeat: {}", "Say {}", "Copy this: {}", "Write {}")).format(words), words)


def letters(rng: random.Random) -> Line:
    """Ask for the first or last letter, one by its place, or their number."""
    word = _word(rng)
    place = rng.randrange(min(3, len(word)))
    return rng.choice(
        (
            Line(f"What is the first letter of {word}?", word[0]),
            Line(f"What is the last letter of {word}?", word[-1]),
            Line(f"How many letters does {word} have?", str(len(word))),
            Line(f"What is the {('first', 'second', 'third')[place]} letter of {word}?", word[place]),
        )
    )


def backwards(rng: random.Random) -> Line:
    """Ask for a short word from its end."""
    word = random_letters(rng, rng.randint(2, 4))
    return Line(rng.choice(("Write {} backwards.", "What is {} from the end?")).format(word), word[::-1])


def tally(rng: random.Random) -> Line:
    """Ask how often something stands in a list."""
    pool = rng.sample(tuple(COLOURS) if rng.random() < 0.5 else tuple(SHAPES), 3)
    things = rng.choices(pool, k=rng.randint(1, 6))
    asked = rng.choice(things) if rng.random() < 0.9 else rng.choice(pool)
    form = rng.choice(("How many times does {} appear: {}?", "How often is {} in this list: {}?"))
    return Line(form.format(asked, " ".join(things)), str(things.count(asked)))


def length(rng: random.Random) -> Line:
    """Ask how many things a list holds."""
    things = [_thing(rng) for _ in range(rng.randint(1, 6))]
    form = rng.choice(("How many objects are in this list: {}?", "Count these: {}.", "How many: {}?"))
    return Line(form.format(", ".join(things)), str(len(things)))


def tally_named(rng: random.Random) -> Line:
    """Ask how many of a list are of one colour or shape."""
    things = [
        (rng.choice(tuple(COLOURS)[:4]), rng.choice(tuple(SHAPES)[:4])) for _ in range(rng.randint(1, 5))
    ]
    listed = enumerate_words([article(" ".join(thing)) for thing in things])
    colour, shape = rng.choice(things)
    if rng.random() < 0.5:
        return Line(
            f"There is {listed}. How many {colour} objects?", str(sum(c == colour for c, _ in things))
        )
    return Line(f"There is {listed}. How many {PLURALS[shape]}?", str(sum(s == shape for _, s in things)))


def compare(rng: random.Random) -> Line:
    """Ask for the larger or the smaller of two numbers."""
    top = rng.choice((9, 99, TOP))
    a, b = rng.sample(range(top + 1), 2)
    if rng.random() < 0.5:
        return Line(f"Which is larger, {a} or {b}?", str(max(a, b)))
    return Line(f"Which is smaller, {a} or {b}?", str(min(a, b)))


def check(rng: random.Random) -> Line:
    """Ask whether one number is larger than another."""
    a, b = rng.sample(range(rng.choice((10, 100, TOP + 1))), 2)
    return Line(f"Is {a} larger than {b}?", "Yes" if a > b else "No")


def following(rng: random.Random) -> Line:
    """Ask for the number before or after, or a small sum."""
    number, more = rng.randint(1, 98), rng.randint(1, 5)
    return rng.choice(
        (
            Line(f"What comes after {number}?", str(number + 1)),
            Line(f"What comes before {number}?", str(number - 1)),
            Line(f"What is {number % 6} plus {more}?", str(number % 6 + more)),
        )
    )


def typical(rng: random.Random) -> Line:
    """Ask for the colour things usually have."""
    colour, things = rng.choice(tuple(TYPICAL.items()))
    return Line(rng.choice(("What colour is {}?", "What color is {}?")).format(rng.choice(things)), colour)


def opposite(rng: random.Random) -> Line:
    """Ask for the opposite of a word."""
    a, b = rng.sample(rng.choice(OPPOSITES), 2)
    return Line(rng.choice(("What is the opposite of {}?", "Name the opposite of {}.")).format(a), b)


def sides(rng: random.Random) -> Line:
    """Ask how many sides a shape has, or its plural."""
    if rng.random() < 0.5:
        shape, number = rng.choice(tuple(SIDES.items()))
        return Line(
            rng.choice(("How many sides has {}?", "How many sides does {} have?")).format(article(shape)),
            number,
        )
    shape, plural = rng.choice(tuple(PLURALS.items()))
    return Line(f"What is the plural of {shape}?", plural)


def attribute(rng: random.Random) -> Line:
    """Ask for the colour or the shape in a name."""
    name = _thing(rng)
    colour, shape = name.split()
    if rng.random() < 0.5:
        return Line(f"There is {article(name)}. What colour is the {shape}?", colour)
    return Line(f"There is {article(name)}. What shape is the {colour} object?", shape)


def present(rng: random.Random) -> Line:
    """Ask whether something is among the things named."""
    things = list(dict.fromkeys(_thing(rng) for _ in range(rng.randint(1, 3))))
    asked = rng.choice(things) if rng.random() < 0.5 else _thing(rng)
    listed = enumerate_words([article(thing) for thing in things])
    return Line(f"There is {listed}. Is there {article(asked)}?", "Yes" if asked in things else "No")


def copy_box(rng: random.Random) -> Line:
    """Ask for the box told for a name."""
    name = rng.choice((_thing, _word))(rng)
    corners = _corners(rng)
    return Line(f"The {name} is at {_det(corners)}. Where is the {name}?", format_box(name, [corners]))


def choose_box(rng: random.Random) -> Line:
    """Ask for the box of one of two things, or which is further left."""
    a, b = _thing(rng), _thing(rng)
    while b == a:
        b = _thing(rng)
    one, two = _corners(rng), _corners(rng)
    told = f"The {a} is at {_det(one)}, the {b} at {_det(two)}."
    if rng.random() < 0.7:
        name, corners = rng.choice(((a, one), (b, two)))
        return Line(f"{told} Where is the {name}?", format_box(name, [corners]))
    if one[0] == two[0]:
        return Line(f"{told} What is at {_det(two)}?", b)
    return Line(f"{told} Which is further left?", a if one[0] < two[0] else b)


def corners(rng: random.Random) -> Line:
    """Ask for one edge of a box."""
    x1, y1, x2, y2 = box = _corners(rng)
    what, answer = rng.choice((("left edge", x1), ("top edge", y1), ("right edge", x2), ("bottom edge", y2)))
    return Line(f"What is the {what} of {_det(box)}?", str(answer))


def talk(rng: random.Random, *, name: str = NAME) -> Line:
    """Make polite small talk, with a model of this name."""
    asked, answer = rng.choice(TALK)
    return Line(rng.choice(asked), answer.format(name=name))


DIALOGUES: dict[str, Callable[[random.Random], Line]] = {
    "spell": spell,
    "join": join,
    "copy": copy,
    "letters": letters,
    "backwards": backwards,
    "tally": tally,
    "length": length,
    "tally_named": tally_named,
    "compare": compare,
    "check": check,
    "following": following,
    "typical": typical,
    "opposite": opposite,
    "sides": sides,
    "attribute": attribute,
    "present": present,
    "copy_box": copy_box,
    "choose_box": choose_box,
    "corners": corners,
    "talk": talk,
}
"""Every kind of dialogue."""
