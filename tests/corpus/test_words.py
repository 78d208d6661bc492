import random

from seekvl.corpus.words import WORDS, WORDS_HELD_OUT, WORDS_TRAIN, draw_word, random_letters


def test_words_are_capitals_of_three_to_six_letters_each_once():
    assert len(WORDS) == len(set(WORDS)) >= 500
    assert all(3 <= len(word) <= 6 and word.isascii() and word.isupper() for word in WORDS)


def test_a_fifth_is_held_out_and_stays_so():
    assert set(WORDS_TRAIN) | set(WORDS_HELD_OUT) == set(WORDS)
    assert not set(WORDS_TRAIN) & set(WORDS_HELD_OUT)
    assert 0.15 < len(WORDS_HELD_OUT) / len(WORDS) < 0.25


def test_random_letters_never_spell_a_held_out_word():
    rng = random.Random(0)
    drawn = [random_letters(rng, 3) for _ in range(5000)]
    assert not set(drawn) & set(WORDS_HELD_OUT)
    assert {len(random_letters(rng, length)) for length in (1, 6)} == {1, 6}


def test_training_words_are_of_one_to_six_letters():
    rng = random.Random(0)
    lengths = {len(draw_word(rng)) for _ in range(500)}
    assert lengths == {1, 2, 3, 4, 5, 6}
    assert min(len(draw_word(rng, held_out=True)) for _ in range(200)) == 3
