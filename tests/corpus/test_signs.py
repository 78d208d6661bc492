import random

import numpy as np
import pytest

from seekvl.corpus.scene import COLOURS
from seekvl.corpus.signs import LEAST_LETTER, draw_sign
from seekvl.corpus.words import WORDS_HELD_OUT, WORDS_TRAIN, draw_word


@pytest.mark.parametrize("seed", range(25))
def test_letters_lie_in_order_within_the_word_within_the_sign(seed):
    scene = draw_sign(random.Random(seed))
    width, height = scene.image.size
    (text,) = scene.of("text")
    letters = scene.of("letter")
    assert "".join(letter.shape for letter in letters) == scene.word == text.shape
    centres = [(letter.box[0] + letter.box[2]) / 2 for letter in letters]
    assert centres == sorted(centres)
    for letter in letters:
        slack = 2 + 0.1 * (letter.box[3] - letter.box[1])  # corners of a turned box reach beyond the ink
        assert letter.box[0] >= text.box[0] - slack
        assert letter.box[2] <= text.box[2] + slack
    for sign in scene.of("sign"):
        assert sign.box[0] <= text.box[0] <= text.box[2] <= sign.box[2]
        assert sign.box[1] <= text.box[1] <= text.box[3] <= sign.box[3]
    for thing in scene.objects:
        assert -1 <= thing.box[0] < thing.box[2] <= width + 1
        assert -1 <= thing.box[1] < thing.box[3] <= height + 1


@pytest.mark.parametrize("seed", range(12))
def test_ink_fills_the_box_of_each_letter(seed):
    scene = draw_sign(random.Random(seed), word="HEN")
    pixels = np.asarray(scene.image).astype(float)
    for letter in scene.of("letter"):
        x1, y1, x2, y2 = (round(value) for value in letter.box)
        ink = np.linalg.norm(pixels[y1:y2, x1:x2] - COLOURS[letter.colour], axis=2) < 80
        assert ink.any(axis=1).mean() > 0.8
        assert ink.any(axis=0).mean() > 0.8


def test_letters_are_tall_enough_to_read():
    for seed in range(150):
        scene = draw_sign(random.Random(seed), word="WWMMWW" if seed % 2 else "HELP")
        for letter in scene.of("letter"):
            assert letter.box[3] - letter.box[1] >= 0.94 * LEAST_LETTER * max(scene.image.size)


def test_held_out_words_are_only_on_held_out_signs():
    assert draw_sign(random.Random(0), held_out=True).word in WORDS_HELD_OUT
    for seed in range(200):
        assert draw_word(random.Random(seed)) not in WORDS_HELD_OUT
        held_out = draw_word(random.Random(seed), held_out=True)
        assert held_out in WORDS_HELD_OUT
        assert held_out not in WORDS_TRAIN
