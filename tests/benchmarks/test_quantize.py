import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import quantize as program

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "quantize.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_both_formats_of_nano_and_a_miniature() -> None:
    models = ("--models", "seekvl-nano", "vl1-siglip", "--formats", "int8", "int4")
    done = run("--n", "3", *models, "--pictures", "6", "--agreement", "1.0", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    rows = {
        "seekvl-nano": ("int8", "int8 calibrated", "int8 at 100%", "int4", "int4 calibrated", "int4 at 100%"),
        "vl1-siglip": ("int8", "int8 calibrated", "int4", "int4 calibrated"),
    }
    assert list(figures) == [f"{name}, {row}" for name, some in rows.items() for row in some]
    for name, figure in figures.items():
        assert set(figure) == {"share", "kl", "likeliest", "answers", "alike"}, name
        assert 0 <= figure["answers"] <= figure["alike"] <= 1, name
        if name.endswith("100%"):
            assert (figure["share"], figure["answers"]) == (0.0, 1.0), name
            assert abs(figure["kl"]) < 1e-9, name
        else:
            assert 0 < figure["kl"] < 1, name
            assert figure["share"] == 1.0, name
    for name in ("seekvl-nano", "vl1-siglip"):
        assert figures[f"{name}, int8"]["kl"] < figures[f"{name}, int4"]["kl"]


def test_bfloat16_is_a_format_too() -> None:
    done = run("--n", "4", "--models", "seekvl-nano", "--formats", "bfloat16", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert list(figures) == ["seekvl-nano, bfloat16"]
    assert 0 < figures["seekvl-nano, bfloat16"]["kl"] < 1e-3


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("<|det|>[[100, 100, 300, 300]]<|/det|>", "<|det|>[[100, 100, 300, 304]]<|/det|>", True),
        ("<|det|>[[100, 100, 300, 300]]<|/det|>", "<|det|>[[100, 100, 300, 400]]<|/det|>", False),
        ("<|det|>[[1, 1, 30, 30]]<|/det|>", "<|det|>[[1, 1, 30, 30]]<|/det|> and more", False),
        ("red", "blue", False),
    ],
)
def test_boxes_that_overlap_are_alike(one: str, other: str, same: bool) -> None:
    assert program.alike(one, other) is same


def test_a_number_that_cannot_be_meant() -> None:
    done = run("--n", "0")
    assert done.returncode == 2
    assert "--n must be at least 1, not 0" in done.stderr
    assert "--smallest must be at least 0, not -1" in run("--smallest", "-1").stderr
    assert "--pictures must be 0, or 2 and more, not 1" in run("--pictures", "1").stderr


def test_what_is_left_as_it_is_changes_nothing() -> None:
    arguments = (
        "--n",
        "2",
        "--models",
        "seekvl-nano",
        "--formats",
        "int4",
        "--smallest",
        "262144",
        "--pictures",
        "0",
    )
    done = run(*arguments, "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    figure = json.loads(done.stdout.splitlines()[-1])["seekvl-nano, int4"]
    assert (figure["likeliest"], figure["answers"]) == (1.0, 1.0)
    assert abs(figure["kl"]) < 1e-9
