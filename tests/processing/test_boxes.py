"""Boxes in every form and back, overlap, matching, accuracy."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekvl.processing.boxes import TOP, Box, accuracy, iou, match
from seekvl.runtime import SeekVLError

SIDE = st.integers(1, 10_000)
SPAN = st.tuples(st.integers(0, TOP), st.integers(0, TOP)).map(sorted)
ANY = st.builds(lambda across, down: Box("a", across[0], down[0], across[1], down[1], 2), SPAN, SPAN)


@pytest.mark.parametrize(
    "corners",
    [
        (5, 0, 4, 9),
        (0, 9, 4, 5),
        (-1, 0, 4, 9),
        (0, 0, 4, 1000),
        (0.5, 0, 4, 9),
        (True, 0, 4, 9),
        ("1", 0, 4, 9),
    ],
)
def test_impossible_boxes(corners: tuple[int, int, int, int]) -> None:
    with pytest.raises(SeekVLError, match="whole numbers needed"):
        Box("a", *corners)


def test_whole_numbers_of_numpy_become_ours() -> None:
    box = Box("a", *np.array([1, 2, 3, 4]))
    assert json.dumps(box.corners) == "[1, 2, 3, 4]"
    assert box == Box("a", 1, 2, 3, 4)


@given(box=ANY, width=SIDE, height=SIDE)
@settings(max_examples=200, deadline=None)
def test_out_of_a_box_and_back(box: Box, width: int, height: int) -> None:
    pixels, xywh = box.pixels(width, height), box.xywh(width, height)
    assert Box.from_pixels("a", pixels, width=width, height=height, image=2) == box
    assert Box.from_xywh("a", xywh, width=width, height=height, image=2) == box
    assert Box.from_yolo("a", box.yolo(), image=2) == box


@given(numbers=st.lists(st.floats(0, 1), min_size=4, max_size=4), width=SIDE, height=SIDE)
@settings(max_examples=200, deadline=None)
def test_into_a_box_moves_by_half_a_step_at_most(numbers: list[float], width: int, height: int) -> None:
    (x1, x2), (y1, y2) = sorted(numbers[:2]), sorted(numbers[2:])
    wanted = (x1 * width, y1 * height, x2 * width, y2 * height)
    box = Box.from_pixels("a", wanted, width=width, height=height)
    for there, here, side in zip(wanted, box.pixels(width, height), (width, height) * 2, strict=True):
        assert abs(there - here) <= side / TOP / 2 + 1e-6
    yolo = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
    for there, here in zip((x1, y1, x2, y2), Box.from_yolo("a", yolo).corners, strict=True):
        assert abs(there - here / TOP) <= 1 / TOP / 2 + 1e-9


@given(box=ANY, width=SIDE, height=SIDE)
@settings(max_examples=100, deadline=None)
def test_whole_pixels_lose_less_than_one(box: Box, width: int, height: int) -> None:
    for whole, exact in zip(box.pixel_ints(width, height), box.pixels(width, height), strict=True):
        assert 0 <= exact - whole < 1
    again = Box.from_pixels("a", box.pixel_ints(width, height), width=width, height=height)
    for one, other, side in zip(again.corners, box.corners, (width, height) * 2, strict=True):
        assert abs(one - other) <= TOP / side + 0.5


def test_annotations_that_stand_out() -> None:
    assert Box.from_xywh("a", (-0.4, 0, 641, 480), width=640, height=480).corners == (0, 0, 999, 999)
    assert Box.from_yolo("a", (0.5, 0.5, 1.0001, 1)).corners == (0, 0, 999, 999)
    with pytest.raises(SeekVLError, match="reaches 645, outside of its picture's side of 0 to 640"):
        Box.from_pixels("a", (0, 0, 645, 10), width=640, height=480)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(SeekVLError, match="outside"):
            Box.from_yolo("a", (bad, 0.5, 0.1, 0.1))


def test_bad_forms() -> None:
    with pytest.raises(SeekVLError, match="swapped corners"):
        Box.from_pixels("a", (5, 0, 4, 9), width=10, height=10)
    with pytest.raises(SeekVLError, match="swapped corners"):
        Box.from_xywh("a", (5, 0, -4, 9), width=10, height=10)
    with pytest.raises(SeekVLError, match="must not be negative"):
        Box.from_yolo("a", (0.5, 0.5, -0.1, 0.1))
    with pytest.raises(SeekVLError, match="4 numbers"):
        Box.from_yolo("a", (0.5, 0.5, 0.1))
    with pytest.raises(SeekVLError, match="0x10 px"):
        Box.from_pixels("a", (0, 0, 0, 0), width=0, height=10)


def test_iou() -> None:
    a = Box("a", 0, 0, 100, 100)
    assert iou(a, a) == 1.0
    assert iou(a, Box("b", 100, 0, 200, 100)) == 0.0
    assert iou(a, Box("b", 300, 300, 400, 400)) == 0.0
    assert iou(a, Box("b", 0, 0, 50, 100)) == 0.5
    assert iou(Box("a", 1, 1, 1, 1), Box("b", 1, 1, 1, 1)) == 0.0


@given(a=ANY, b=ANY)
@settings(max_examples=100, deadline=None)
def test_overlap_is_symmetric_and_a_share(a: Box, b: Box) -> None:
    assert 0 <= iou(a, b) == iou(b, a) <= 1


def test_the_best_overlap_is_matched_first() -> None:
    wanted = [Box("dog", 0, 0, 100, 100), Box("dog", 0, 0, 100, 60)]
    found = [Box("Dog ", 0, 0, 100, 80), Box("dog", 0, 0, 100, 100), Box("dog", 500, 0, 600, 100)]
    matches = match(wanted, found)
    assert [(pair.wanted, pair.found, pair.iou) for pair in matches.pairs] == [(0, 1, 1.0), (1, 0, 0.75)]
    assert (matches.precision, matches.recall, matches.f1) == (2 / 3, 1.0, 0.8)


def test_labels_and_pictures_count_in_matching() -> None:
    a = Box("dog", 0, 0, 9, 9)
    assert match([a], [Box("cat", 0, 0, 9, 9)]).pairs == ()
    assert match([a], [Box("cat", 0, 0, 9, 9)], same_label=False).pairs[0].iou == 1.0
    assert match([a], [Box("dog", 0, 0, 9, 9, 1)]).f1 == 0.0
    nothing = match([], [])
    assert (nothing.precision, nothing.recall, nothing.f1) == (1.0, 1.0, 1.0)


def test_accuracy_counts_first_boxes() -> None:
    box, off = Box("a", 0, 0, 100, 100), Box("a", 0, 0, 100, 49)
    half = Box("other", 0, 0, 100, 50)
    assert accuracy([box] * 4, [[half], [off, box], [], [box, off]]) == 0.5
    with pytest.raises(SeekVLError, match="as many answers as questions, not 0 for 1"):
        accuracy([box], [])
