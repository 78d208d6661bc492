import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "quantize.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_both_formats_of_nano_and_a_miniature() -> None:
    done = run("--n", "3", "--models", "seekvl-nano", "vl1-siglip", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    names = [f"{name}, {kind}" for name in ("seekvl-nano", "vl1-siglip") for kind in ("int8", "int4")]
    assert list(figures) == names
    for name, figure in figures.items():
        assert set(figure) == {"kl", "likeliest", "answers"}, name
        assert 0 < figure["kl"] < 1, name
        assert 0 <= figure["answers"] <= 1, name
    for name in ("seekvl-nano", "vl1-siglip"):
        assert figures[f"{name}, int8"]["kl"] < figures[f"{name}, int4"]["kl"]


def test_a_number_that_cannot_be_meant() -> None:
    done = run("--n", "0")
    assert done.returncode == 2
    assert "--n must be at least 1, not 0" in done.stderr
    assert "--smallest must be at least 0, not -1" in run("--smallest", "-1").stderr


def test_what_is_left_as_it_is_changes_nothing() -> None:
    arguments = ("--n", "2", "--models", "seekvl-nano", "--formats", "int4", "--smallest", "262144")
    done = run(*arguments, "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    figure = json.loads(done.stdout.splitlines()[-1])["seekvl-nano, int4"]
    assert (figure["likeliest"], figure["answers"]) == (1.0, 1.0)
    assert abs(figure["kl"]) < 1e-9
