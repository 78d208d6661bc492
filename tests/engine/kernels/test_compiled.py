import _ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seekvl.engine.kernels import compiled as room
from seekvl.engine.kernels.compiled import LEVELS, SWITCH, Library, choose_level, library, missing
from seekvl.engine.kernels.products import linear
from seekvl.runtime import SeekVLError


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forget the loaded library, before and after."""
    monkeypatch.delenv(SWITCH, raising=False)
    for cached in (room.library, room._warn):
        cached.cache_clear()
    yield monkeypatch
    for cached in (room.library, room._warn):
        cached.cache_clear()


def test_without_a_library_torch_computes_after_one_warning(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setattr(room, "PATH", tmp_path / "native.so")
    with caplog.at_level(logging.WARNING, logger="seekvl"):
        assert [choose_level(), choose_level(), choose_level("auto")] == [None] * 3
    (record,) = caplog.records
    assert "install a C++ compiler" in record.getMessage()
    with pytest.raises(SeekVLError, match="not compiled"):
        choose_level("portable")
    with pytest.raises(SeekVLError, match="not compiled"):
        linear(torch.ones(1, 2), torch.ones(3, 2))


def test_a_library_that_does_not_load(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "native.so"
    broken.write_bytes(b"\x7fELF and nothing more")
    fresh.setattr(room, "PATH", broken)
    with pytest.raises(SeekVLError, match="cannot be loaded"):
        library()
    reason = missing()
    assert reason is not None
    assert str(broken) in reason


def test_a_library_of_other_sources(native: Library, fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(room.structures, "total_bytes", lambda: 8)
    with pytest.raises(SeekVLError, match=r"compiled from other sources than this seekvl \(\d+ and 8 bytes"):
        library()


def test_a_library_without_our_functions(fresh: pytest.MonkeyPatch) -> None:
    """As one of a former installation lacks the newest of them."""
    fresh.setattr(room, "PATH", Path(_ctypes.__file__))
    with pytest.raises(SeekVLError, match=r"compiled from other sources than this seekvl \(0 and \d+ bytes"):
        library()


def test_off_needs_no_library_and_warns_of_nothing(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setattr(room, "PATH", tmp_path / "native.so")
    fresh.setenv(SWITCH, "off")
    with caplog.at_level(logging.WARNING, logger="seekvl"):
        assert choose_level() is None
    assert not caplog.records


def test_the_environment_names_a_level(native: Library, fresh: pytest.MonkeyPatch) -> None:
    for name in native.levels:
        fresh.setenv(SWITCH, name)
        assert choose_level() == name
    fresh.setenv(SWITCH, "auto")
    assert choose_level() == native.levels[-1]
    fresh.setenv(SWITCH, "off")
    assert choose_level("portable") == "portable"  # an argument stands above the environment


@pytest.mark.parametrize("name", ["AVX2", "fast", "", "avx1024"])
def test_an_unknown_level(fresh: pytest.MonkeyPatch, name: str) -> None:
    fresh.setenv(SWITCH, name)
    with pytest.raises(SeekVLError, match=f"SEEKVL_KERNELS='{name}' is unknown; use auto, off or one of"):
        choose_level()


def test_a_level_of_another_machine(native: Library, fresh: pytest.MonkeyPatch) -> None:
    (foreign, *_) = [name for name in LEVELS if name not in native.levels]
    with pytest.raises(SeekVLError, match=rf"{foreign}'.*executes portable"):
        choose_level(foreign)


def test_the_portable_level_is_always_there(native: Library) -> None:
    assert native.levels[0] == "portable"
    assert [LEVELS.index(name) for name in native.levels] == sorted(LEVELS.index(n) for n in native.levels)


def test_threads_end_when_released_and_come_back(native: Library) -> None:
    x, weight = torch.randn(1, 512), torch.randn(512, 512)
    first = linear(x, weight, threads=3)
    assert native.workers() >= 2
    native.release()
    assert native.workers() == 0
    assert torch.equal(linear(x, weight, threads=3), first)
    assert native.workers() == 2


def test_a_process_that_used_the_kernels_ends(native: Library) -> None:
    program = (
        "import torch\n"
        "from seekvl.engine.kernels.products import linear\n"
        "print(float(linear(torch.ones(1, 512), torch.ones(512, 512), threads=4)[0, 0]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "512.0", "")
