import json
import subprocess
import sys
from pathlib import Path

import pytest

from seekvl.engine.kernels.compiled import missing

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
REASON = missing()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_every_matrix_on_every_side() -> None:
    quick = ("--tiny", "--rounds", "2", "--threads", "1", "--memory", "1", "--quiet", "0")
    done = run(*quick, "--batch", "1", "12", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) == {"small matrix, 1", "small matrix, 12", "small experts, 1", "small experts, 12"}
    for name, figure in figures.items():
        assert set(figure) == {"ours", "peer", "ratio", "unit", "peer_name", "ceiling"}, name
        assert min(figure["ours"], figure["peer"], figure["ceiling"]) > 0, name
        assert figure["ratio"] == figure["ours"] / figure["peer"], name
        assert name.partition(",")[0] in done.stdout


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_matrices_and_prompts(kind: str) -> None:
    quick = ("--tiny", "--rounds", "2", "--threads", "1", "--memory", "1", "--quiet", "0")
    done = run(*quick, "--dtype", kind, "--batch", "1", "20", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) == {"small matrix, 1", "small matrix, 20", "small experts, 1", "small experts, 20"}
    assert all(min(figure["ours"], figure["peer"]) > 0 for figure in figures.values())


def test_a_number_that_cannot_be_meant() -> None:
    done = run("--batch", "0")
    assert done.returncode == 2
    assert "--batch must be at least 1, not 0" in done.stderr
