"""Readable text out of pieces, and boxes in pixels."""

import random

import pytest
from PIL import Image

from seekvl.cli.show import Readable, box_lines, upright
from seekvl.processing.grounding import Box, strip_marks
from tests.cli.conftest import GOLDEN

ANSWERS = [
    "Plain text, a < b and a <| b.",
    " <|grounding|>A <|ref|>red dog<|/ref|><|det|>[[1, 2, 3, 4], [5, 6, 7, 8]]<|/det|> runs.",
    "<|ref|>dog<|/ref|> <|det|>[[1, 2, 3, 4]]<|/det|> <|ref|>cat<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>",
    "cut off <|ref|>dog<|/ref|><|det|>[[1, 2",
    "ends with a beginning <|re",
    "two\n\nlines  and   blanks \n",
    "",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("seed", range(5))
def test_pieces_joined_equal_the_readable_whole(answer: str, seed: int) -> None:
    rng, left, readable, shown = random.Random(seed), answer, Readable(), ""
    while left:
        cut = rng.randint(1, 4)
        shown += readable.push(left[:cut])
        assert strip_marks(answer).startswith(shown)
        left = left[cut:]
    assert shown + readable.finish() == strip_marks(answer)


def test_text_before_a_mark_does_not_wait() -> None:
    readable = Readable()
    assert readable.push("It is") == "It is"
    assert readable.push(" a dog<|") == " a dog"


def test_boxes_in_pixels_and_without_a_picture() -> None:
    box = Box("red star", 0, 0, 999, 333)
    assert box_lines([box], [(640, 480)]) == ["red star  0 0 640 160 (px)"]
    assert box_lines([box], [(640, 480), (5, 5)]) == ["red star  0 0 640 160 (px of picture 1)"]
    assert box_lines([box], []) == ["red star  0 0 999 333 (0..999)"]


def test_upright_is_what_the_preprocessing_sees() -> None:
    with Image.open(GOLDEN / "images" / "exif6_120x80.png") as picture:
        assert upright(picture, preprocessing="official").size == (120, 80)
        assert upright(picture, preprocessing="seekvl").size == (80, 120)
