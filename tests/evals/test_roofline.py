from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from seekvl.evals.roofline import _peaks, draw_roofline
from seekvl.runtime import SeekVLError
from tests.evals.test_speed_report import report


def test_the_picture_shows_the_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    whole, bare = report(), report()
    moved = replace(whole.figures[1], seconds=1.0)
    draw_roofline(whole, tmp_path / "whole.png")
    draw_roofline(replace(bare, figures=(moved,)), tmp_path / "moved.png")
    pictures = [Image.open(tmp_path / name).convert("RGB") for name in ("whole.png", "moved.png")]
    assert all(picture.width > 600 for picture in pictures)
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_a_quantised_model_has_two_roofs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plain, packed = report(), replace(report(), quantize="int8")
    assert _peaks(plain) == {"bfloat16": 455e9}
    assert _peaks(packed) == {"bfloat16": 455e9, "int8": 900e9}
    for name, found in (("plain.png", plain), ("packed.png", packed)):
        draw_roofline(found, tmp_path / name)
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "packed.png").read_bytes()


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SeekVLError, match=r"ends in \.png"):
        draw_roofline(report(), tmp_path / "roof.svg")
    with pytest.raises(SeekVLError, match="does not exist"):
        draw_roofline(report(), tmp_path / "missing" / "roof.png")
