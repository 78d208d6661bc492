import os
import subprocess
import sys
from collections import Counter
from hashlib import sha256

import pytest

from seekvl.corpus.nano import KINDS, sample, scene, text_sample
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


@pytest.mark.parametrize("kind", KINDS)
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


def test_boxes_to_be_measured_are_single_and_possible():
    for index in range(60):
        assert len(parse_boxes(said(sample(0, index, kind="locate", questions=1))[1])) == 1


def test_scene_gives_the_style_asked_for():
    for style in ("shapes", "sign", "chart"):
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
