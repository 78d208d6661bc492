"""The kernels compiled for 64-bit ARM, run under an emulator: NEON beside the portable level (levels.cpp)."""

import os
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from seekvl.engine.kernels.compiled import LEVELS

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "seekvl/engine/kernels/src").glob("*.cpp"))
DRIVER = Path(__file__).with_name("levels.cpp")
PROCESSORS = {"cortex-a72": "plain", "max": "dotprod"}
"""What the emulator shows of itself, and how the packed kernels multiply bytes there."""

pytestmark = [
    pytest.mark.arm,
    pytest.mark.skipif(
        None in (shutil.which(COMPILER), shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR}: apt-get install g++-aarch64-linux-gnu qemu-user",
    ),
]


def compiled(source: Path, folder: Path, *, extra: tuple[str, ...] = ()) -> Path:
    """Compile a source of the kernels with the flags of setup.py."""
    with mock.patch("setuptools.setup"):
        flags = runpy.run_path(str(ROOT / "setup.py"))["flags_for"](source.stem, arm=True)
    target = folder / f"{source.stem}.o"
    subprocess.run([COMPILER, *flags, *extra, "-c", str(source), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("arm")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compiled(source, folder), SOURCES))


def link(objects: list[Path], program: Path) -> Path:
    """Link the driver with objects of the kernels."""
    inputs = [str(path) for path in (DRIVER, *objects)]
    options = ["-std=c++17", "-O1", "-static", "-pthread", f"-I{SOURCES[0].parent}"]
    subprocess.run([COMPILER, *options, *inputs, "-o", str(program)], check=True)
    return program


def emulate(program: Path, *arguments: str, processor: str) -> list[list[str]]:
    """Run the driver on an emulated processor; return its words, line by line."""
    command = [EMULATOR, "-cpu", processor, str(program), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [line.split() for line in done.stdout.splitlines()]


def apart(program: Path, *, processor: str = "max") -> dict[str, tuple[float, float]]:
    """Return how far NEON is from the portable level, and how far it may be."""
    lines = emulate(program, str(LEVELS.index("neon")), processor=processor)
    return {name: (float(found), float(limit)) for name, found, limit in lines}


@pytest.fixture(scope="module")
def program(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(objects, tmp_path_factory.mktemp("driver") / "levels")


@pytest.mark.parametrize("processor", PROCESSORS)
def test_neon_computes_what_the_portable_level_does(processor: str, program: Path) -> None:
    """One program for both processors: it uses what the one it runs on has."""
    assert emulate(program, processor=processor) == [[PROCESSORS[processor]]]
    found = apart(program, processor=processor)
    assert len(found) > 80
    assert {name.partition("/")[0] for name in found} >= {
        "bfloat16",
        "int4",
        "experts",
        "attention",
        "latent",
    }
    assert {name: pair for name, pair in found.items() if not pair[0] <= pair[1]} == {}
    assert max(difference for difference, _ in found.values()) > 0, "two levels add in two orders"


def test_a_wrong_sum_is_found(objects: list[Path], tmp_path: Path) -> None:
    source = next(path for path in SOURCES if path.stem == "neon")
    wrong = tmp_path / "neon.cpp"
    text = source.read_text(encoding="utf-8")
    assert text.count("vaddvq_f32(a)") == 1
    wrong.write_text(text.replace("vaddvq_f32(a)", "vgetq_lane_f32(a, 0)"), encoding="utf-8")
    other = compiled(wrong, tmp_path, extra=(f"-I{source.parent}",))
    inputs = [other if path.stem == "neon" else path for path in objects]
    found = apart(link(inputs, tmp_path / "levels"))
    assert not found["float32/float32/1"][0] <= found["float32/float32/1"][1]
