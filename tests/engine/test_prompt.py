import random
from collections.abc import Iterable

import pytest

from seekvl.engine.prompt import Prompt, Shown, common_beginning, common_cut, common_tokens, make_prompt

RED, BLUE = Shown(3, 9, b"red"), Shown(3, 9, b"blue")


def prompt(*ids: int, pictures: tuple[Shown, ...] = (), chunk: int = 4) -> Prompt:
    return make_prompt(ids, pictures, chunk=chunk)


@pytest.mark.parametrize(
    ("total", "pictures", "chunk", "cuts"),
    [
        (3, (), 4, ()),
        (4, (), 4, (4,)),
        (9, (), 4, (4, 8)),
        (10, (RED,), 100, (9,)),
        (9, (RED,), 4, (4, 8, 9)),
        (14, (Shown(1, 5, b"a"), Shown(5, 9, b"b")), 4, (4, 5, 9, 13)),
    ],
)
def test_cuts_are_at_the_ends_of_pictures_and_every_so_many_tokens(
    total: int, pictures: tuple[Shown, ...], chunk: int, cuts: tuple[int, ...]
) -> None:
    assert make_prompt(range(total), pictures, chunk=chunk).cuts == cuts


def test_prompts_that_begin_alike_are_cut_alike() -> None:
    drawn = random.Random(3)
    for _ in range(200):
        pictures, place = [], 0
        for digest in range(drawn.randrange(4)):
            start = place + drawn.randrange(5)
            place = start + 1 + drawn.randrange(9)
            pictures.append(Shown(start, place, bytes([digest])))
        ids = [drawn.randrange(5) for _ in range(place + 1 + drawn.randrange(20))]
        whole = make_prompt(ids, pictures, chunk=6)
        end = 1 + drawn.randrange(len(ids))
        if any(shown.start < end < shown.end for shown in pictures):
            continue
        begun = make_prompt(ids[:end], [shown for shown in pictures if shown.end <= end], chunk=6)
        assert begun.cuts == tuple(cut for cut in whole.cuts if cut <= end)
        assert begun.marks == whole.marks[: len(begun.marks)]
        assert common_cut(begun, whole) == max((0, *begun.cuts))


def test_a_cut_is_common_only_with_the_same_tokens_and_pictures() -> None:
    ids = range(20)
    red, blue = (make_prompt(ids, [shown], chunk=4) for shown in (RED, BLUE))
    assert red.cuts == (4, 8, 9, 13, 17)
    assert common_cut(red, red) == 17
    assert common_cut(red, blue) == 0  # the picture begins in front of the first cut
    other = make_prompt([*range(15), 99, *range(16, 20)], [RED], chunk=4)
    assert common_cut(red, other) == 13
    assert common_cut(make_prompt(ids, [], chunk=4), red) == 0


def test_tokens_are_common_up_to_a_picture_that_differs() -> None:
    held = list(range(20))
    assert common_tokens(held, [RED], make_prompt(held, [RED], chunk=4)) == 19  # never the last one
    assert common_tokens(held, [RED], make_prompt(held, [BLUE], chunk=4)) == 3
    assert common_tokens(held[:7], [], make_prompt(held, [RED], chunk=4)) == 3
    assert common_tokens(held[:12], [RED], make_prompt(held, [RED], chunk=4)) == 12
    two = make_prompt(held, [RED, Shown(10, 15, b"green")], chunk=4)
    assert common_tokens(held, [RED, Shown(10, 15, b"grey")], two) == 10
    assert common_tokens([], [], two) == 0


def test_a_seamless_prompt_is_cut_every_so_many_tokens_only() -> None:
    whole = make_prompt(range(14), [RED], chunk=4, seamless=True)
    assert whole.cuts == (4, 8, 12)
    assert whole.seamless
    assert not make_prompt(range(14), [RED], chunk=4).seamless


def test_the_common_beginning_of_two_prompts() -> None:
    def seamless(ids: Iterable[int], *pictures: Shown) -> Prompt:
        return make_prompt(list(ids), pictures, chunk=4, seamless=True)

    red, blue = seamless(range(14), RED), seamless(range(14), BLUE)
    assert common_beginning(red, red) == 14
    assert common_beginning(red, blue) == common_beginning(blue, red) == 3
    assert common_beginning(red, seamless([*range(11), 99], RED)) == 11
    assert common_beginning(red, seamless(range(14))) == common_beginning(seamless(range(14)), red) == 3
    assert common_beginning(red, seamless(range(20), RED, Shown(15, 18, b"more"))) == 14
    assert common_beginning(red, seamless(range(2))) == 2
    assert common_beginning(red, seamless([7])) == 0
