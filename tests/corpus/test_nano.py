import os
import subprocess
import sys
from collections import Counter
from hashlib import sha256

import pytest

from seekvl.corpus.nano import KINDS, MIXTURE, SMALL_KINDS, Mixture, sample, scene, text_sample
from seekvl.corpus.words import WORDS_HELD_OUT
from seekvl.processing.conversation import Text
from seekvl.processing.grounding import parse_boxes
from seekvl.runtime import SeekVLError


def said(one) -> list[str]:
    return [
        "".join(part.text for part in each.parts if isinstance(part, Text))
        for each in one.conversation.messages
    ]


def print_of(one) -> str:
    pixels = b"".join(picture.source.tobytes() for picture in one.conversation.pictures)
    return sha256(pixels + "\n".join(said(one)).encode()).hexdigest()


def test_a_sample_depends_on_seed_and_index_alone():
    prints = [print_of(sample(5, index)) for index in range(6)]
    assert len(set(prints)) == 6
    assert print_of(sample(6, 0)) != prints[0]
    assert print_of(sample(5, 0, held_out=True)) != prints[0]
    code = (
        "from hashlib import sha256\nfrom seekvl.corpus.nano import sample\n"
        "for i in range(5, -1, -1):\n"
        "    m = sample(5, i).conversation\n"
        "    words = ['|'.join(getattr(p, 'text', '') for p in x.parts) for x in m.messages]\n"
        "    pixels = b''.join(p.source.tobytes() for p in m.pictures)\n"
        "    print(sha256(pixels + repr(words).encode()).hexdigest())\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0].count(b"\n") == 6


STRIPS = Mixture(shapes=0, sign=0, chart=0, strip=1)


def test_the_samples_of_seekvl_nano_stay_what_they_were():
    # of words, sizes and boxes: pixels would change with the version of the library that draws letters, too
    lines = []
    for index in range(24):
        one = sample(5, index, held_out=index % 4 == 3)
        lines += [*said(one), *(str(picture.source.size) for picture in one.conversation.pictures)]
    for kind in ("count", "locate", "read"):
        for index in range(4):
            lines += said(sample(5, index, kind=kind, questions=2))
    lines += [repr(scene(5, index).objects) for index in range(8)]
    assert sha256("\n".join(lines).encode()).hexdigest()[:16] == "782512d210619b79"


def test_a_mixture_says_how_often_each_style_is_drawn():
    mixture = Mixture(shapes=45, sign=25, chart=10, strip=20)
    counts = Counter(scene(0, index, mixture=mixture).style for index in range(200))
    assert set(counts) == {"shapes", "sign", "chart", "strip"}
    assert 25 <= counts["strip"] <= 60
    assert counts["shapes"] > counts["sign"] > counts["chart"]
    assert "strip" not in MIXTURE.shares()
    assert "strip" not in MIXTURE.shares(kind="locate")


def test_a_mixture_of_strips_asks_about_strips_alone():
    kinds = Counter()
    for index in range(30):
        one = sample(0, index, mixture=STRIPS)
        if len(one.conversation.pictures) == 1:
            width, height = one.conversation.pictures[0].source.size
            assert max(width, height) >= 1.9 * min(width, height)
            kinds[len(one.conversation.messages)] += 1
    assert max(kinds) == 12


def test_a_kind_finds_its_style_where_the_mixture_lacks_it():
    usual = sample(0, 3, kind="small_print", questions=1)
    assert print_of(usual) == print_of(sample(0, 3, kind="small_print", questions=1, mixture=STRIPS))
    assert sample(0, 0, kind="chart", questions=1, mixture=STRIPS).kind == "chart"


@pytest.mark.parametrize("share", [-1, float("nan"), float("inf")])
def test_impossible_shares_are_refused(share):
    with pytest.raises(SeekVLError, match=r"Mixture.strip is .*: a share is a finite number of at least 0"):
        Mixture(shapes=55, sign=33, chart=12, strip=share)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(SeekVLError, match="every share of the mixture is 0"):
        Mixture(shapes=0, sign=0, chart=0, strip=0)


def test_pictures_come_in_the_first_turn_and_one_time_in_ten_two():
    counts = Counter()
    for index in range(300):
        one = sample(0, index, questions=3)
        messages = one.conversation.messages
        counts[len(one.conversation.pictures)] += 1
        assert len(messages[0].pictures) == len(one.conversation.pictures)
        assert 2 <= len(messages) <= 6
        assert [message.role for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert set(counts) == {1, 2}
    assert 15 <= counts[2] <= 50


def test_no_question_is_asked_twice_and_no_answer_given_away():
    read = ("What does the text", "Read the", "What word")
    for index in range(150):
        texts = said(sample(1, index))
        assert len(set(texts[::2])) == len(texts[::2])
        for turn in range(0, len(texts), 2):
            if texts[turn].startswith(read) and "picture" not in texts[turn]:
                assert texts[turn + 1] not in " ".join(texts[:turn]).split()


@pytest.mark.parametrize("kind", [*KINDS, *SMALL_KINDS])
def test_a_kind_asks_nothing_else(kind):
    for index in range(10):
        one = sample(0, index, kind=kind, questions=1)
        assert one.kind == kind
        assert len(one.conversation.messages) == 2


def test_counts_to_be_measured_are_even_from_one_to_five():
    counts = Counter(said(sample(0, i, kind="count", held_out=True, questions=1))[1] for i in range(500))
    assert set(counts) == set("12345")
    assert min(counts.values()) > 70


def test_held_out_signs_show_words_that_training_never_shows():
    for index in range(60):
        assert said(sample(0, index, kind="read", held_out=True, questions=1))[1] in WORDS_HELD_OUT
        assert said(sample(0, index, kind="read", questions=1))[1] not in WORDS_HELD_OUT


def test_held_out_small_print_shows_words_that_training_never_shows():
    words = 0
    for index in range(40):
        answer = said(sample(0, index, kind="small_print", held_out=True, questions=1))[1]
        assert answer.isdigit() or answer in WORDS_HELD_OUT
        words += not answer.isdigit()
        assert said(sample(0, index, kind="small_print", questions=1))[1] not in WORDS_HELD_OUT
    assert words > 20


@pytest.mark.parametrize("kind", ["locate", "small_locate"])
def test_boxes_to_be_measured_are_single_and_possible(kind):
    for index in range(60):
        assert len(parse_boxes(said(sample(0, index, kind=kind, questions=1))[1])) == 1


def test_scene_gives_the_style_asked_for():
    for style in ("shapes", "sign", "chart", "strip"):
        assert scene(0, 1, style=style).style == style
    assert {scene(0, index).style for index in range(40)} == {"shapes", "sign", "chart"}


@pytest.mark.parametrize("call", [
    lambda: sample(0, 0, kind="smell"),
    lambda: sample(0, -1),
    lambda: sample(0, 0, questions=0),
    lambda: scene(0, 0, style="oil"),
    lambda: text_sample(0, 0, kind="poem"),
    lambda: text_sample(0, 0, turns=0),
    lambda: text_sample(0, -2),
])  # fmt: skip
def test_wrong_calls_stop_with_one_line(call):
    with pytest.raises(SeekVLError) as error:
        call()
    assert "\n" not in str(error.value)
