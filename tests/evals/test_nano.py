import json

import pytest

from seekvl.corpus.nano import KINDS, SMALL_KINDS, sample
from seekvl.evals import nano
from seekvl.evals.nano import SCORES, Example, Report, Row, evaluate, examples, score
from seekvl.processing.conversation import Conversation, Message, Text
from seekvl.runtime import SeekVLError

BOX = "<|ref|>red circle<|/ref|><|det|>[[100, 100, 200, 200]]<|/det|>"


def example(kind: str, expected: str) -> Example:
    return Example(
        id="x", kind=kind, conversation=Conversation((Message("user", (Text("?"),)),)), expected=expected
    )


@pytest.mark.parametrize(
    ("kind", "expected", "answer", "points"),
    [
        ("colour", "red", " Red\n", 1.0),
        ("colour", "red", "red circle", 0.0),
        ("count", "3", "3", 1.0),
        ("count", "3", "three", 0.0),
        ("read", "STOP", "STOP", 1.0),
        ("read", "STOP", "Stop", 0.0),
        ("read", "STOP", "", 0.0),
        ("locate", BOX, BOX, 1.0),
        ("locate", BOX, BOX.replace("200, 200", "200, 151"), 1.0),  # IoU 0.51
        ("locate", BOX, BOX.replace("200, 200", "200, 149"), 0.0),  # IoU 0.49
        ("locate", BOX, "red circle", 0.0),
        ("locate", BOX, BOX + BOX, 0.0),
        ("small_print", "STOP", " STOP", 1.0),
        ("small_print", "STOP", "Stop", 0.0),
        ("small_print", "470", "47", 0.0),
        ("small_locate", BOX, BOX.replace("200, 200", "200, 151"), 1.0),
        ("small_locate", BOX, BOX.replace("200, 200", "200, 149"), 0.0),
        ("small_count", "10", "10", 1.0),
        ("small_count", "10", "1", 0.0),
        ("small_colour", "red", "Red", 1.0),
        ("caption", "A red ring.", "A red ring.", 1.0),
        ("caption", "A red ring.", "A ring.", 0.0),
    ],
)
def test_scores_by_hand(kind, expected, answer, points):
    assert score(example(kind, expected), answer) == points


def test_every_kind_the_corpus_names_is_measured():
    assert tuple(SCORES) == (*KINDS, *SMALL_KINDS)


def test_small_print_is_measured_only_where_it_is_asked_for():
    assert nano.KINDS == KINDS
    report = evaluate(lambda asked: [""] * len(asked), sample, n=1, seed=0)
    assert [row.kind for row in report.rows] == list(KINDS)


@pytest.mark.parametrize("kind", [*KINDS, *SMALL_KINDS])
def test_examples_end_in_the_question_and_their_own_answer_is_right(kind):
    for one in examples(sample, kind, n=5, seed=1):
        assert one.conversation.messages[-1].role == "user"
        assert one.conversation.pictures
        assert score(one, one.expected) == 1.0


def test_evaluate_counts_right_answers_in_batches():
    expected = [one.expected for one in examples(sample, "colour", n=10, seed=3)]
    sizes = []

    def answer(conversations):
        start = sum(sizes)
        sizes.append(len(conversations))
        return [
            text if start + i < 6 else "nothing"
            for i, text in enumerate(expected[start : start + len(conversations)])
        ]

    report = evaluate(answer, sample, n=10, seed=3, kinds=["colour"], batch=4)
    assert sizes == [4, 4, 2]
    assert report.rows[0].accuracy == pytest.approx(0.6)
    assert report.rows[0].standard_error == pytest.approx((0.6 * 0.4 / 10) ** 0.5)


def test_reports_are_readable_by_people_and_programs():
    report = Report(seed=7, rows=(Row(kind="count", n=500, accuracy=0.9),))
    assert report.table().splitlines()[-1] == "| count | 500 | 90.0 % | 1.3 % |"
    assert json.loads(report.json())["kinds"]["count"]["accuracy"] == 0.9


def test_missing_answers_are_an_error_with_both_numbers():
    with pytest.raises(SeekVLError, match=r"3 questions of kind 'exist' got 2 answers"):
        evaluate(lambda asked: ["Yes", "No"], sample, n=3, seed=0, kinds=["exist"])


@pytest.mark.parametrize(("kind", "n"), [("smell", 3), ("count", 0)])
def test_impossible_wishes_are_refused(kind, n):
    with pytest.raises(SeekVLError):
        examples(sample, kind, n=n, seed=0)


def test_an_expected_answer_without_one_box_is_an_error():
    with pytest.raises(SeekVLError, match="holds 0 boxes"):
        score(example("locate", "There is no red circle."), BOX)
