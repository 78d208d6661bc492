from pathlib import Path

import pytest

from seekvl.engine.kernels import compiled as room
from seekvl.engine.kernels import report
from seekvl.engine.kernels.compiled import SWITCH, Library
from seekvl.engine.kernels.products import linear
from seekvl.engine.kernels.report import compare_with_torch
from seekvl.runtime import SeekVLError


def test_it_names_the_level_and_the_difference(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, level)
    said = compare_with_torch()
    assert said.startswith(f"{level} of portable")
    assert 0 < float(said.rpartition(" ")[2]) < 1e-3


def test_it_says_why_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "PATH", tmp_path / "native.so")
    room.library.cache_clear()
    try:
        monkeypatch.delenv(SWITCH, raising=False)
        assert "torch computes: the CPU kernels were not compiled" in compare_with_torch()
    finally:
        room.library.cache_clear()


def test_switched_off(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert compare_with_torch() == "torch computes: SEEKVL_KERNELS=off"


def test_a_wrong_product_is_an_error(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(report, "linear", lambda *args, **more: linear(*args, **more) + 0.1)
    with pytest.raises(SeekVLError, match=r"differs by 1\.0e-01 from torch, at most"):
        compare_with_torch()
