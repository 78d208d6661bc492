import numpy as np
import pytest
from PIL import Image

from seekvl.processing.grounding import Box, draw_boxes, format_box, iou, parse_boxes, strip_marks
from seekvl.runtime import SeekVLError


def marked(label: str, inner: str) -> str:
    return f"<|ref|>{label}<|/ref|><|det|>{inner}<|/det|>"


def test_one_label_several_boxes() -> None:
    text = (
        "See "
        + marked("two dogs", "[[1, 2, 3, 4], [5, 6, 999, 999]]")
        + " and "
        + marked("猫", "[[0,0,0,0]]")
    )
    assert parse_boxes(text, image=1) == [
        Box("two dogs", 1, 2, 3, 4, 1),
        Box("two dogs", 5, 6, 999, 999, 1),
        Box("猫", 0, 0, 0, 0, 1),
    ]


MALFORMED = [
    "",
    "[[1, 2, 3]]",
    "[[3, 2, 1, 4]]",
    "[[1, 4, 3, 2]]",
    "[[0, 0, 1000, 5]]",
    "[[-1, 0, 5, 5]]",
    "[[a, b, c, d]]",
    "[[1e3, 2, 3, 4]]",
    "[[5*2, 20, 30+1, 40]]",
    "[[" + "9" * 5000 + ", 1, 2, 3]]",
    "__import__('os')",
]


@pytest.mark.parametrize("inner", MALFORMED)
def test_malformed_boxes_are_left_out(inner: str) -> None:
    good = marked("b", "[[1, 2, 3, 4]]")
    assert parse_boxes(marked("a", inner) + good) == [Box("b", 1, 2, 3, 4)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "<|ref|>a<|/ref|>",
        "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]",
        "<|det|>[[1, 2, 3, 4]]<|/det|>",
    ],
)
def test_incomplete_marks(text: str) -> None:
    assert parse_boxes(text) == []


def test_tolerance() -> None:
    assert parse_boxes(marked("a\nb", " [ [1 ,2, 3,4] ,\n[5,6,7,8]]")) == [
        Box("a\nb", 1, 2, 3, 4),
        Box("a\nb", 5, 6, 7, 8),
    ]
    for inner in ("[[1, 2, 3, 4, 7]]", "[[1, 2, 3, 4,]]", "[[1.2, 1.7, 3.0, 4.]]"):
        assert parse_boxes(marked("a", inner)) == [Box("a", 1, 2, 3, 4)], inner
    assert parse_boxes(marked(" a ", "[[1, 2, 3, 4]]")) == [Box(" a ", 1, 2, 3, 4)]
    assert parse_boxes("<|ref|>a<|/ref|><|det|>[[9, 9, 9, 9]] " + marked("b", "[[1, 2, 3, 4]]")) == [
        Box("b", 1, 2, 3, 4)
    ]
    assert parse_boxes(marked("a", "[1, 2, 3, 4]")) == [Box("a", 1, 2, 3, 4)]
    assert parse_boxes("<|ref|>x <|ref|>a<|/ref|> <|det|>[[1, 2, 3, 4]]<|/det|>") == [Box("a", 1, 2, 3, 4)]


def test_format_is_the_inverse_of_parse() -> None:
    boxes = [Box("a", 1, 2, 3, 4), Box("a", 0, 0, 999, 999)]
    text = format_box("a", boxes)
    assert text == "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4], [0, 0, 999, 999]]<|/det|>"
    assert parse_boxes(text) == boxes
    assert format_box("a", [(1, 2, 3, 4)]) == "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"


@pytest.mark.parametrize(
    "corners", [(5, 0, 4, 9), (0, 9, 4, 5), (-1, 0, 4, 9), (0, 0, 4, 1000), (0.5, 0, 4, 9)]
)
def test_impossible_boxes(corners: tuple[int, int, int, int]) -> None:
    with pytest.raises(SeekVLError, match="whole numbers needed"):
        Box("a", *corners)
    with pytest.raises(SeekVLError, match="whole numbers needed"):
        format_box("a", [corners])


def test_bad_formats() -> None:
    with pytest.raises(SeekVLError, match="at least one"):
        format_box("a", [])
    with pytest.raises(SeekVLError, match="grounding mark"):
        format_box("a<|/ref|>", [(1, 2, 3, 4)])


def test_pixels() -> None:
    x1, y1, x2, y2 = Box("a", 243, 133, 606, 557).pixels(640, 480)
    assert (int(x1), int(y1), int(x2), int(y2)) == (155, 63, 388, 267)  # as the published parser draws it


def test_iou() -> None:
    a = Box("a", 0, 0, 100, 100)
    assert iou(a, a) == 1.0
    assert iou(a, Box("b", 100, 0, 200, 100)) == 0.0
    assert iou(a, Box("b", 300, 300, 400, 400)) == 0.0
    assert iou(a, Box("b", 0, 0, 50, 100)) == 0.5
    assert iou(Box("a", 1, 1, 1, 1), Box("b", 1, 1, 1, 1)) == 0.0


def test_strip_marks() -> None:
    text = (
        "<|grounding|>There is "
        + marked("a dog", "[[1, 2, 3, 4]]")
        + " and "
        + marked("a cat", "[[1,2,3,4]]")
        + "."
    )
    assert strip_marks(text) == "There is a dog and a cat."
    assert strip_marks("x <|ref|>a<|/ref|><|det|>[[1, 2") == "x a"
    assert strip_marks("plain < text |>") == "plain < text |>"


def test_drawing() -> None:
    image = Image.new("RGBA", (200, 100), "white")
    drawn = draw_boxes(image, [Box("dog", 250, 250, 750, 750), Box("cat", 0, 0, 999, 999)])
    assert drawn.size == (200, 100)
    assert drawn.mode == "RGB"
    assert image.getpixel((50, 50)) == (255, 255, 255, 255)
    assert drawn.getpixel((50, 60)) != (255, 255, 255)
    assert drawn.getpixel((199, 50)) != (255, 255, 255)
    assert drawn.getpixel((100, 60)) == (255, 255, 255)


def test_drawing_leaves_the_original_alone() -> None:
    image = Image.new("RGB", (50, 50), "white")
    assert np.asarray(draw_boxes(image, [Box("a", 0, 0, 999, 999)])).min() < 255
    assert np.asarray(image).min() == 255
    assert np.array_equal(np.asarray(draw_boxes(image, [])), np.asarray(image))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2000, 10)])
def test_drawing_on_absurd_pictures(size: tuple[int, int]) -> None:
    boxes = [
        Box("a rather long label for this", 900, 900, 999, 999),
        Box("", 0, 0, 0, 0),
        Box("图", 5, 5, 9, 9),
    ]
    assert draw_boxes(Image.new("RGB", size), boxes).size == size


def test_the_label_is_inside_the_picture() -> None:
    drawn = np.asarray(draw_boxes(Image.new("RGB", (300, 200), "white"), [Box("label", 900, 900, 999, 999)]))
    coloured = (drawn != 255).any(axis=2)
    assert coloured[:, :269].any()  # the plate was moved left of the box, to fit
