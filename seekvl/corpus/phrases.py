"""The wordings of questions about pictures; both spellings of colour occur."""

from collections.abc import Sequence

NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "heart": "hearts",
    "cross": "crosses",
    "diamond": "diamonds",
    "ring": "rings",
}

ASK: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {thing}?",
        "What color is the {thing}?",
        "Which colour does the {thing} have?",
        "Name the colour of the {thing}.",
        "The {thing} is what color?",
    ),
    "background": (
        "What colour is the background?",
        "What color is the background?",
        "Name the background colour.",
    ),
    "shape": (
        "What shape is the {colour} object?",
        "What is the {colour} object?",
        "What is the shape of the {colour} object?",
        "Which shape is {colour}?",
        "What is {colour} in the picture?",
    ),
    "count": (
        "How many objects are in the picture?",
        "How many objects are there?",
        "How many shapes are there?",
        "Count the objects.",
        "What is the number of objects?",
    ),
    "count shape": (
        "How many {things} are there?",
        "How many {things} are in the picture?",
        "How many {things} do you see?",
        "Count the {things}.",
    ),
    "count colour": (
        "How many {colour} objects are there?",
        "How many objects are {colour}?",
        "How many {colour} shapes do you see?",
        "Count the {colour} objects.",
    ),
    "locate": (
        "Where is the {thing}?",
        "Find the {thing}.",
        "Locate the {thing}.",
        "Show me the {thing}.",
        "Give the box of the {thing}.",
    ),
    "region": ("What is at {box}?", "Which object is at {box}?", "Name the object at {box}."),
    "read": (
        "What does the sign say?",
        "Read the sign.",
        "What is written on the sign?",
        "What word is on the sign?",
        "What is written in the picture?",
        "Read the word.",
    ),
    "read bare": (
        "What does the text say?",
        "Read the text.",
        "What is written in the picture?",
        "What word is this?",
        "Read the word.",
        "Which word is in the picture?",
    ),
    "spell": ("Spell the word.", "Read the word letter by letter.", "Spell what is written."),
    "first letter": ("What is the first letter of the word?", "Which letter does the word start with?"),
    "last letter": ("What is the last letter of the word?", "Which letter does the word end with?"),
    "letters": ("How many letters does the word have?", "How many letters are in the word?"),
    "exist": (
        "Is there {thing}?",
        "Is there {thing} in the picture?",
        "Do you see {thing}?",
        "Does the picture show {thing}?",
    ),
    "relation": (
        "Is the {a} {side} the {b}?",
        "Is the {a} {side} the {b}?",
        "Does the {a} lie {side} the {b}?",
    ),
    "what is": ("What is {side} the {b}?", "Which object is {side} the {b}?"),
    "outermost left of": (
        "Which object is on the left?",
        "What is on the left?",
        "Which object is furthest left?",
    ),
    "outermost right of": (
        "Which object is on the right?",
        "What is on the right?",
        "Which object is furthest right?",
    ),
    "outermost above": ("Which object is at the top?", "What is at the top?", "Which object is highest?"),
    "outermost below": (
        "Which object is at the bottom?",
        "What is at the bottom?",
        "Which object is lowest?",
    ),
    "larger": (
        "Which is larger, the {a} or the {b}?",
        "Which is bigger, the {a} or the {b}?",
        "What is larger: the {a} or the {b}?",
    ),
    "smaller": ("Which is smaller, the {a} or the {b}?", "What is smaller: the {a} or the {b}?"),
    "tallest": ("Which bar is tallest?", "Which bar is the tallest?", "What colour is the highest bar?"),
    "shortest": ("Which bar is shortest?", "Which bar is the shortest?", "What colour is the lowest bar?"),
    "bars": ("How many bars are there?", "How many bars does the chart have?", "Count the bars."),
    "bar colour": ("What colour is bar {label}?", "What color is the bar labelled {label}?"),
    "bar label": ("What is the label of the {colour} bar?", "Which letter is under the {colour} bar?"),
    "taller": ("Is the {a} bar taller than the {b} bar?", "Is the {a} bar higher than the {b} one?"),
    "caption": (
        "Describe the picture.",
        "Describe this image.",
        "What is in the picture?",
        "What do you see?",
        "What does the picture show?",
        "Give a short caption.",
    ),
    "more": (
        "Which picture has more objects, the first or the second?",
        "Which picture shows more objects?",
        "In which picture are more objects?",
    ),
    "has": ("Which picture has {thing}?", "Which picture shows {thing}?", "In which picture is {thing}?"),
    "caption of": ("What is in the {which} picture?", "Describe the {which} picture."),
    "count of": ("How many objects are in the {which} picture?", "Count the objects in the {which} picture."),
    "colour of": (
        "What colour is the {thing} in the {which} picture?",
        "In the {which} picture, what color is the {thing}?",
    ),
    "read of": ("What does the sign in the {which} picture say?", "Read the word in the {which} picture."),
    "nth word": (
        "What is the {nth} word?",
        "Read the {nth} word.",
        "Which word is the {nth}?",
        "What does the {nth} word say?",
    ),
    "nth line": (
        "What is the {nth} line?",
        "Read the {nth} line.",
        "What does the {nth} line say?",
        "What is written on the {nth} line?",
    ),
    "nth panel": (
        "What is written on the {nth} panel?",
        "Read the {nth} panel.",
        "What does the {nth} panel say?",
        "Which word is on the {nth} panel?",
    ),
    "nth number": ("What is the {nth} number?", "Read the {nth} number.", "Which number is the {nth}?"),
    "after": (
        "Which word comes after {word}?",
        "What is the word after {word}?",
        "Which word follows {word}?",
    ),
    "before": ("Which word comes before {word}?", "What is the word before {word}?"),
    "under": (
        "Which word is below {word}?",
        "What is the word under {word}?",
        "What is written below {word}?",
    ),
    "over": ("Which word is above {word}?", "What is the word over {word}?", "What is written above {word}?"),
    "on panel": (
        "What is written on the {thing}?",
        "What does the {thing} say?",
        "Read the {thing}.",
        "Which word is on the {thing}?",
    ),
    "beside bullet": (
        "What is written beside the {thing}?",
        "Which word is beside the {thing}?",
        "What does the line with the {thing} say?",
        "Read the word beside the {thing}.",
    ),
    "after bullet": (
        "What is written after the {thing}?",
        "Which word stands after the {thing}?",
        "Which word is right of the {thing}?",
        "Read the word after the {thing}.",
    ),
    "at pointer": (
        "Which number does the {thing} point at?",
        "At which number is the {thing}?",
        "What does the {thing} point at?",
        "Read the number at the {thing}.",
    ),
    "number beside": (
        "Which number is beside {word}?",
        "What number is beside {word}?",
        "Which number belongs to {word}?",
        "What is the number of {word}?",
    ),
    "number under": (
        "Which number is under {word}?",
        "What number is below {word}?",
        "Which number belongs to {word}?",
        "What is the number of {word}?",
    ),
    "word beside": (
        "Which word is beside {number}?",
        "What is written beside {number}?",
        "Which word has the number {number}?",
        "Which word does {number} belong to?",
    ),
    "word over": (
        "Which word is above {number}?",
        "What is written over {number}?",
        "Which word has the number {number}?",
        "Which word does {number} belong to?",
    ),
    "locate word": (
        "Where is the word {word}?",
        "Find the word {word}.",
        "Where does it say {word}?",
        "Locate {word}.",
        "Show me the word {word}.",
        "Give the box of the word {word}.",
    ),
    "locate number": (
        "Where is the number {number}?",
        "Find the number {number}.",
        "Where does it say {number}?",
        "Locate the number {number}.",
        "Give the box of the number {number}.",
    ),
    "lines": ("How many lines are there?", "How many lines do you see?", "Count the lines."),
    "words": ("How many words are there?", "How many words are in the picture?", "Count the words."),
    "panels": ("How many panels are there?", "How many panels do you see?", "Count the panels."),
    "numbers": ("How many numbers are there?", "How many numbers are on the ruler?", "Count the numbers."),
    "panel colour": (
        "What colour is the panel that says {word}?",
        "What color is the panel with the word {word}?",
        "On which colour is {word} written?",
    ),
    "bullet colour": (
        "What colour is the {shape} beside {word}?",
        "What color is the {shape} beside {word}?",
        "Which colour does the {shape} beside {word} have?",
    ),
    "bullet colour before": (
        "What colour is the {shape} before {word}?",
        "What color is the {shape} left of {word}?",
        "Which colour does the {shape} before {word} have?",
    ),
    "pointer colour": (
        "What colour is the triangle at {word}?",
        "What color is the triangle that points at {word}?",
    ),
    "spell nth": ("Spell the {nth} word.", "Read the {nth} word letter by letter."),
    "first letter of nth": (
        "What is the first letter of the {nth} word?",
        "Which letter does the {nth} word start with?",
    ),
    "last letter of nth": (
        "What is the last letter of the {nth} word?",
        "Which letter does the {nth} word end with?",
    ),
    "all": (
        "Read everything.",
        "Read all that is written.",
        "What is written in the picture?",
        "Read the text.",
    ),
}
"""Wordings by template; what stands in braces is filled in."""


def article(words: str) -> str:
    """Put "a" or "an" before words.

    >>> article("orange star"), article("red ring")
    ('an orange star', 'a red ring')
    """
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def enumerate_words(words: Sequence[str]) -> str:
    """Join words with commas and a last "and".

    >>> enumerate_words(["red", "blue", "green"])
    'red, blue and green'
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
