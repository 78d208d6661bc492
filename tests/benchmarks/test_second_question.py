import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "second_question.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_the_picture_is_taken_over() -> None:
    done = run("--tiny", "--rounds", "2", "--threads", "1", "--quiet", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert "36 tokens were taken over" in done.stdout  # 20 in front of the picture and its 16
    figure = json.loads(done.stdout.splitlines()[-1])["second_question"]
    assert set(figure) == {"ours", "peer", "ratio", "unit", "peer_name"}
    assert figure["ratio"] == figure["ours"] / figure["peer"] > 0


def test_a_number_that_cannot_be_meant() -> None:
    done = run("--rounds", "0")
    assert done.returncode == 2
    assert "--rounds must be at least 1, not 0" in done.stderr
