from seekvl.engine.guess import PATIENCE, PAUSE, Guesser


def test_what_followed_before_is_guessed() -> None:
    guesser = Guesser([1, 2, 3, 4, 5, 6, 9, 2, 3], most=3)
    assert guesser.guess(8) == [4, 5, 6]
    assert guesser.guess(2) == [4, 5]
    assert guesser.guess(0) == []
    guesser.take(7)
    assert guesser.guess(8) == []  # 3 7 never stood together
    for token in (4, 5):
        guesser.take(token)
    assert guesser.guess(8) == [6, 9, 2]


def test_more_tokens_in_common_win_and_the_latest_place_wins() -> None:
    assert Guesser([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], most=1).guess(1) == [7]
    assert Guesser([5, 2, 3, 7, 6, 2, 3, 8, 4, 2, 3], most=1).guess(1) == [8]


def test_nothing_is_guessed_where_it_is_off() -> None:
    guesser = Guesser([1, 1, 1, 1], most=0)
    guesser.take(1)
    assert guesser.guess(5) == []


def test_wrong_guesses_make_a_pause_and_right_ones_none() -> None:
    guesser = Guesser([1, 2] * 10, most=4)
    for _ in range(50):
        guesser.judge(guessed=4, right=2)
    assert guesser.guess(4)
    for _ in range(PATIENCE // 4):
        assert guesser.guess(4)
        guesser.judge(guessed=4, right=0)
    for _ in range(PAUSE // 2):
        assert not guesser.guess(4)
        guesser.take(1)
        assert not guesser.guess(4)
        guesser.take(2)
    assert guesser.guess(4)
    assert (guesser.guessed, guesser.right) == (200 + PATIENCE, 100)
