"""Prompts, both parsers over the golden cases and the documented table, and thousands of odd strings."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import seekvl
from seekvl.processing.grounding import (
    TOP,
    Box,
    format_box,
    format_boxes,
    grounded,
    in_context,
    parse_boxes,
    refer,
    strip_marks,
)
from seekvl.runtime import SeekVLError

ROOT = Path(__file__).parents[2]
CASES = json.loads((ROOT / "tests" / "golden" / "grounding-parse" / "cases.json").read_text(encoding="utf-8"))
COMPUTED = {"arithmetic expression", "True element"}
"""Where the reference draws what it got by evaluating the answer as Python; we do not."""


def marked(label: str, inner: str) -> str:
    return f"<|ref|>{label}<|/ref|><|det|>{inner}<|/det|>"


def rows() -> list[tuple[str, ...]]:
    """Read the table of docs/grounding.md: case, answer, tolerant, strict."""
    text = (ROOT / "docs" / "grounding.md").read_text(encoding="utf-8")
    lines = text.partition("| case |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [tuple(cell.strip().replace(r"\|", "|").replace(r"\n", "\n") for cell in row) for row in cells]


def strictly(text: str) -> tuple[list[Box] | None, str]:
    """Read strictly; give what was read, or None and what was said against it."""
    try:
        return parse_boxes(text, strict=True), ""
    except SeekVLError as error:
        return None, str(error)


def drawn(case: dict[str, object]) -> list[Box]:
    """Make the boxes the reference drew, rounded as ours are."""
    pairs = zip(case["labels"], case["boxes"], strict=True)  # type: ignore[call-overload]
    return [Box(label, *(min(max(round(value), 0), TOP) for value in box[:4])) for label, box in pairs]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_documented_table(row: tuple[str, ...]) -> None:
    _, answer, tolerant, strict = row
    answer = answer.strip("`")
    boxes = parse_boxes(answer)
    said = "; ".join(f"{box.label}: {' '.join(map(str, box.corners))}" for box in boxes)
    assert said == ("" if tolerant == "none" else tolerant)
    if strict == "same":
        assert parse_boxes(answer, strict=True) == boxes
        return
    place, _, wanted = strict.partition(": ")
    with pytest.raises(SeekVLError) as error:
        parse_boxes(answer, strict=True)
    assert str(error.value).startswith(f"{place} of the answer: ")
    assert wanted in str(error.value)


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_tolerant_finds_what_the_reference_draws(case: dict[str, object]) -> None:
    boxes = parse_boxes(str(case["response"]))
    if case["name"] in COMPUTED:
        assert boxes == []
    elif case["returned"] == "image" and case["boxes"]:
        assert boxes == drawn(case)
        width, height = case["image_size"]  # type: ignore[misc]
        written, shown = case["boxes"], case["drawn_before_return"]
        for box, numbers, there in zip(boxes, written, shown, strict=True):  # type: ignore[call-overload]
            if list(box.corners) == numbers[:4]:  # neither rounded nor cut
                assert list(box.pixel_ints(width, height)) == there["pixel_box"]


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_strict_reads_no_more_than_tolerant(case: dict[str, object]) -> None:
    text = str(case["response"])
    boxes, error = strictly(text)
    if boxes is None:
        assert re.match(r"letter \d+ of the answer: .+ must stand there, not ", error)
    else:
        assert boxes == parse_boxes(text)


def test_the_reference_draws_these_pixels() -> None:
    for case in CASES["rescale"]:
        assert list(Box("", *case["box"]).pixel_ints(*case["image_size"])) == case["pixel_box"]


MARKS = ["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>"]
SIGNS = ["[", "]", "[[", "]]", ", ", ",", " ", "\n", "<|", "|>", "\ud800", "\x00", "dog"]
NUMBERS = ["0", "7", "999", "1000", "-5", "1.5", "007", "1e3", "９"]
PARTS = st.sampled_from([*MARKS, *SIGNS, *NUMBERS])
ODD = st.one_of(
    st.text(),
    st.lists(PARTS, max_size=40).map("".join),
    st.lists(st.integers(-50, 1200), max_size=9).map(lambda numbers: marked("a", str([numbers]))),
    st.lists(st.one_of(PARTS, st.text(max_size=5)), max_size=20).map(
        lambda parts: marked("a", "".join(parts))
    ),
)


def check(text: str) -> None:
    """Neither parser gives an invalid box, the tolerant one never raises, and both agree where both read."""
    boxes = parse_boxes(text)
    for box in boxes:
        assert Box(box.label, *box.corners) == box
        assert all(type(value) is int for value in box.corners)
    strip_marks(text)
    strict, _ = strictly(text)
    if strict is not None:
        assert strict == boxes
        assert parse_boxes(format_boxes(strict), strict=True) == boxes


@given(ODD)
@example("[" * 2000)
@example(marked("a", "[[" + "9" * 5000 + ", 1, 2, 3]]"))
@example(marked("a", "[" + "1," * 5000 + "]"))
@settings(max_examples=300, deadline=None)
def test_odd_strings(text: str) -> None:
    check(text)


@pytest.mark.slow
@given(ODD)
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_odd_strings(text: str) -> None:
    check(text)


CORNER = st.tuples(st.integers(0, TOP), st.integers(0, TOP)).map(sorted)
BOXES = st.lists(
    st.builds(
        lambda label, across, down: Box(label, across[0], down[0], across[1], down[1]),
        st.sampled_from(["dog", "", " 小猫 ", "a < b <| c"]),
        CORNER,
        CORNER,
    ),
    min_size=1,
)


@given(BOXES)
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(boxes: list[Box]) -> None:
    text = f"I see {format_boxes(boxes)}."
    assert parse_boxes(text, strict=True) == boxes
    assert parse_boxes(text) == boxes


def test_format() -> None:
    boxes = [Box("a", 1, 2, 3, 4), Box("a", 0, 0, 999, 999)]
    text = format_box("a", boxes)
    assert text == "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4], [0, 0, 999, 999]]<|/det|>"
    assert text == format_boxes(boxes)
    assert format_box("a", [(1, 2, 3, 4)]) == "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"
    assert format_boxes([]) == ""


@pytest.mark.parametrize("corners", [(5, 0, 4, 9), (-1, 0, 4, 9), (0, 0, 4, 1000), (0.5, 0, 4, 9)])
def test_impossible_boxes_are_not_written(corners: tuple[int, int, int, int]) -> None:
    with pytest.raises(SeekVLError, match="whole numbers needed"):
        format_box("a", [corners])


def test_bad_formats() -> None:
    with pytest.raises(SeekVLError, match="at least one"):
        format_box("a", [])
    with pytest.raises(SeekVLError, match=r"grounding mark <\|/ref\|>"):
        format_box("a<|/ref|>", [(1, 2, 3, 4)])
    with pytest.raises(SeekVLError, match="line break"):
        format_box("a\nb", [(1, 2, 3, 4)])


def test_prompts() -> None:
    assert refer("The giraffe at the back") == "<|ref|>The giraffe at the back<|/ref|>."
    assert refer("cup", question="Find all the {}.") == "Find all the <|ref|>cup<|/ref|>."
    assert grounded("Who?") == "<|grounding|>Who?"
    assert grounded(refer("cup")) == "<|grounding|><|ref|>cup<|/ref|>."
    assert in_context() == (
        "<|grounding|>In the first image, an object within the red rectangle is marked. "
        "Locate the object of the same category in the second image."
    )


def test_bad_prompts() -> None:
    for phrase in (" ", "a\nb", "a<|ref|>"):
        with pytest.raises(SeekVLError):
            refer(phrase)
    for question in ("Where?", "{} or {}", "<|det|>{}"):
        with pytest.raises(SeekVLError):
            refer("cup", question=question)
    for question in ("", "<|grounding|>Who?"):
        with pytest.raises(SeekVLError):
            grounded(question)
    with pytest.raises(SeekVLError, match="wanted is empty"):
        in_context(wanted=" ")


def test_strip_marks() -> None:
    text = f"<|grounding|>There is {marked('a dog', '[[1, 2, 3, 4]]')} and {marked('a cat', '[[1,2,3,4]]')}."
    assert strip_marks(text) == "There is a dog and a cat."
    assert strip_marks("x <|ref|>a<|/ref|><|det|>[[1, 2") == "x a"
    assert strip_marks("a<|/det|>") == "a"
    assert strip_marks("plain < text |>") == "plain < text |>"


def test_the_toolkit_is_public() -> None:
    assert seekvl.grounding.parse_boxes is parse_boxes
    assert all(getattr(seekvl.grounding, name) is not None for name in seekvl.grounding.__all__)


def test_many_blanks_are_no_work() -> None:
    began = time.perf_counter()
    assert strip_marks("a" + " " * 100_000 + "b <|det|>[[1, 2, 3, 4]]<|/det|>").endswith("  b")
    assert time.perf_counter() - began < 5  # the square of the blanks takes minutes
