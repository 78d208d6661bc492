import hashlib
import re

import pytest

from seekvl.corpus.dialogue import DIALOGUES, text_sample
from seekvl.processing.conversation import Conversation
from seekvl.processing.grounding import parse_boxes


def lines(conversation: Conversation) -> list[tuple[str, str]]:
    texts = [message.parts[0].text for message in conversation.messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


def drawn(kind: str, count: int = 60) -> list[tuple[str, str]]:
    return [line for index in range(count) for line in lines(text_sample(0, index, kind=kind).conversation)]


@pytest.mark.parametrize("kind", DIALOGUES)
def test_every_kind_has_words_and_varies(kind):
    found = drawn(kind, 30)
    assert len(set(found)) > 5
    assert all(question and answer and not set("{}") & set(question + answer) for question, answer in found)


def test_dialogues_depend_on_seed_and_index_and_hold_no_picture():
    assert text_sample(1, 2) == text_sample(1, 2) != text_sample(1, 3)
    assert not text_sample(0, 0).conversation.pictures
    assert {len(text_sample(0, index).conversation.messages) for index in range(60)} == {2, 4, 6, 8}


def test_spelling():
    for question, answer in drawn("spell"):
        assert answer.replace(" ", "") in question
        assert all(len(letter) == 1 for letter in answer.split(" "))


def test_tally():
    for question, answer in drawn("tally"):
        asked = re.search(r"does (\w+) appear|often is (\w+) in", question)
        assert question.rpartition(":")[2].rstrip("?").split().count(asked.group(1) or asked.group(2)) == int(
            answer
        )


def test_numbers():
    for question, answer in drawn("compare"):
        a, b = map(int, re.findall(r"\d+", question))
        assert int(answer) == (max if "larger" in question else min)(a, b)
    for question, answer in drawn("check"):
        a, b = map(int, re.findall(r"\d+", question))
        assert (answer == "Yes") == (a > b)


def test_boxes_are_copied_whole():
    for question, answer in drawn("copy_box"):
        (box,) = parse_boxes(answer)
        assert f"[[{box.x1}, {box.y1}, {box.x2}, {box.y2}]]" in question
        assert box.label in question


def test_each_model_says_its_own_name_and_nothing_else_depends_on_it():
    for index in range(60):
        nano, other = (text_sample(0, index, kind="talk", name=name) for name in ("seekvl-nano", "Other"))
        assert text_sample(0, index, kind="talk") == nano
        said = [(one.replace("seekvl-nano", "Other"), two) for (_, one), (_, two) in zip(
            lines(nano.conversation), lines(other.conversation), strict=True
        )]  # fmt: skip
        assert all(one == two for one, two in said)
    assert any("I am Other, a" in answer for _, answer in lines(other.conversation)) or any(
        "I am Other, a" in answer
        for index in range(60)
        for _, answer in lines(text_sample(0, index, kind="talk", name="Other").conversation)
    )


def test_the_samples_that_nano_learnt_from_do_not_change():
    digest = hashlib.sha256()
    for index in range(300):
        digest.update(repr(text_sample(0, index)).encode())
    assert digest.hexdigest() == "855ca9bca47411396be64769df211d9467d43f96a736672a55e20a306defaa61"
