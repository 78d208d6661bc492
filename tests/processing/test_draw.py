"""Drawn boxes: where labels stand, what an SVG holds, and fonts for letters that Pillow's own lacks."""

import base64
import io
import logging
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from seekvl.processing import fonts
from seekvl.processing.boxes import TOP, Box
from seekvl.processing.draw import Corners, draw_boxes, mark_object, plan, svg_boxes

SVG = "{http://www.w3.org/2000/svg}"
SPAN = st.tuples(st.integers(0, TOP), st.integers(0, TOP)).map(sorted)
ANY = st.builds(
    lambda label, across, down: Box(label, across[0], down[0], across[1], down[1]),
    st.sampled_from(["dog", "", "a red car", "the third cup from the left " * 9]),
    SPAN,
    SPAN,
)


@pytest.fixture(autouse=True)
def no_system_fonts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Look for fonts in an empty folder, so that tests see the same on every machine."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    monkeypatch.setattr(fonts, "folders", lambda: [folder, tmp_path / "none"])
    fonts._files.cache_clear()
    fonts._find.cache_clear()
    return folder


def overlap(a: Corners, b: Corners) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


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
    assert np.asarray(mark_object(image, Box("a", 0, 0, 999, 999))).min() < 255
    assert np.asarray(image).min() == 255
    assert np.array_equal(np.asarray(draw_boxes(image, [])), np.asarray(image))


def test_transparent_parts_are_white() -> None:
    drawn = draw_boxes(Image.new("RGBA", (60, 60), (0, 0, 0, 0)), [Box("a", 0, 0, 300, 300)])
    assert drawn.getpixel((50, 50)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2000, 10)])
def test_drawing_on_absurd_pictures(size: tuple[int, int]) -> None:
    boxes = [
        Box("a rather long label for this", 900, 900, 999, 999),
        Box("", 0, 0, 0, 0),
        Box("图\x00\ud800\n<", 5, 5, 9, 9),
    ]
    image = Image.new("RGB", size)
    assert draw_boxes(image, boxes).size == size
    ElementTree.fromstring(svg_boxes(image, boxes).encode())


@given(boxes=st.lists(ANY, max_size=12), width=st.integers(1, 400), height=st.integers(1, 300))
@settings(max_examples=12, deadline=None)
def test_labels_are_inside_the_picture_and_never_overlap(boxes: list[Box], width: int, height: int) -> None:
    plates = plan((width, height), boxes)
    for index, plate in enumerate(plates):
        x1, y1, x2, y2 = plate.corners
        assert 0 <= x1 <= x2 < width
        assert 0 <= y1 <= y2 < height
        assert not any(overlap(plate.corners, other.corners) for other in plates[:index])


def test_one_label_stands_on_its_box() -> None:
    (plate,) = plan((300, 200), [Box("dog", 300, 500, 700, 900)])
    assert plate.corners[0] == 89  # of 89.8
    assert plate.corners[3] == 98  # right above 99.6, in whole px
    assert plate.leader is None


def test_many_labels_of_one_place_have_lines_to_their_boxes() -> None:
    plates = plan((400, 300), [Box(f"thing {index}", 500, 500, 505, 505) for index in range(30)])
    assert len(plates) == 30
    assert any(plate.leader is not None for plate in plates)


def test_labels_without_room_are_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="seekvl"):
        plates = plan((60, 20), [Box("some words", 0, 0, 999, 999)] * 5)
    assert 0 < len(plates) < 5
    assert f"{5 - len(plates)} of 5 labels find no room in a picture of 60x20 px" in caplog.text


def test_each_label_has_its_colour() -> None:
    boxes = [Box(f"label {index % 15}", 60 * index, 0, 999, 999) for index in range(16)]
    plates = plan((600, 400), boxes)
    assert len(plates) == 16
    assert plates[0].colour == plates[15].colour
    assert len({plate.colour for plate in plates}) == 15


def test_the_svg_holds_the_picture_boxes_and_labels() -> None:
    image = Image.fromarray(np.arange(60 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 80, 3))
    label = 'a <b> & "c" 图'
    svg = ElementTree.fromstring(svg_boxes(image, [Box(label, 100, 500, 900, 999), Box("", 0, 0, 9, 9)]))
    assert (svg.get("width"), svg.get("height")) == ("80", "60")
    data = svg.find(f"{SVG}image").get("href").removeprefix("data:image/png;base64,")  # type: ignore[union-attr]
    with Image.open(io.BytesIO(base64.b64decode(data))) as inside:
        assert np.array_equal(np.asarray(inside), np.asarray(image))
    titles = [title.text for title in svg.iterfind(f"{SVG}rect/{SVG}title")]
    assert titles == [f"{label} 100 500 900 999", " 0 0 9 9"]
    assert [text.text for text in svg.iter(f"{SVG}text")] == [label]


def test_a_font_of_the_system_is_used_where_it_is_needed(no_system_fonts: Path) -> None:
    own = ImageFont.load_default(size=16)
    assert isinstance(own, ImageFont.FreeTypeFont)
    assert fonts.lacks(own, "dog 图 图") == "图"
    (no_system_fonts / "broken.ttf").write_bytes(b"no font")
    source = own.path
    (no_system_fonts / "Plain.ttf").write_bytes(source.getvalue() if hasattr(source, "getvalue") else b"")
    assert fonts.font_for("dog", size=16).getbbox("dog") == own.getbbox("dog")
    assert [path.name for path in fonts._files()] == ["Plain.ttf", "broken.ttf"]


def test_letters_without_a_font_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="seekvl"):
        for _ in range(2):
            draw_boxes(Image.new("RGB", (100, 100)), [Box("图 a 书", 0, 0, 999, 999)])
    assert caplog.text.count("no font on this machine has the letters 图书") == 1


def test_the_folders_of_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for platform, name in (("linux", "share"), ("darwin", "Library"), ("win32", "Fonts")):
        monkeypatch.setattr(fonts.sys, "platform", platform)
        assert any(name in str(folder) for folder in fonts.folders())
