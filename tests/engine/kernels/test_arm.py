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
PROCESSORS = {"any": (), "dotprod": ("-march=armv8.2-a+dotprod",)}
"""What the compiler may use, beside what setup.py lets it; the packed kernels have a faster product then."""

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
        flags = runpy.run_path(str(ROOT / "setup.py"))["flags_for"](source.stem, x86=False)
    target = folder / f"{source.stem}.o"
    subprocess.run([COMPILER, *flags, *extra, "-c", str(source), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("arm")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compiled(source, folder), SOURCES))


def apart(objects: list[Path], program: Path) -> dict[str, tuple[float, float]]:
    """Link and run the driver; return how far NEON is from the portable level, and how far it may be."""
    inputs = [str(path) for path in (DRIVER, *objects)]
    options = ["-std=c++17", "-O1", "-static", "-pthread", f"-I{SOURCES[0].parent}"]
    subprocess.run([COMPILER, *options, *inputs, "-o", str(program)], check=True)
    command = [EMULATOR, "-cpu", "max", str(program), str(LEVELS.index("neon"))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: (float(found), float(limit)) for name, found, limit in lines}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_neon_computes_what_the_portable_level_does(
    processor: str, objects: list[Path], tmp_path: Path
) -> None:
    extra = PROCESSORS[processor]
    chosen = [
        compiled(source, tmp_path, extra=extra) if extra and source.stem == "packed_neon" else made
        for source, made in zip(SOURCES, objects, strict=True)
    ]
    found = apart(chosen, tmp_path / "levels")
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
    found = apart([other if path.stem == "neon" else path for path in objects], tmp_path / "levels")
    assert not found["float32/float32/1"][0] <= found["float32/float32/1"][1]
