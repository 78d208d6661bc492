import json
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "peer_transformers.py"
QUICK = ("--tiny", "--rounds", "1", "--threads", "1", "--tokens", "4", "--quiet", "0")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_every_figure_of_both_programs(tmp_path: Path) -> None:
    done = run(*QUICK, "--json", "--folder", str(tmp_path / "tiny"))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) == {"load", "first_token", "memory", "vision", "prefill", "decode"}
    for name, figure in figures.items():
        assert set(figure) == {"ours", "peer", "ratio", "unit", "peer_name"}, name
        assert figure["ours"] > 0, name
        assert figure["peer"] > 0, name
        assert figure["ratio"] == figure["ours"] / figure["peer"], name
        assert figure["peer_name"] == "transformers"
    assert "first 8 greedy tokens equal" in done.stdout
    assert re.search(r"logits differ by at most 0[.]\d+ standard deviations", done.stdout), done.stdout
    assert (tmp_path / "tiny" / "config.json").exists()


def test_a_number_that_cannot_be_meant() -> None:
    done = run("--tokens", "1")
    assert done.returncode == 2
    assert "--tokens must be at least 2, not 1" in done.stderr
