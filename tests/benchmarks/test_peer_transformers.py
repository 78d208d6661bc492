import json
import re
import subprocess
import sys
from pathlib import Path

from seekvl.weights.read_quantized import stored_matrices

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


def test_whole_numbers_beside_bfloat16(tmp_path: Path) -> None:
    done = run(*QUICK, "--quantize", "int8", "--json", "--folder", str(tmp_path / "tiny"))
    assert done.returncode == 0, done.stderr
    assert "random bfloat16 weights (seekvl's in int8), 1 picture" in done.stdout
    assert "first 8 greedy tokens equal" in done.stdout, "bfloat16 is what is compared"
    assert json.loads(done.stdout.splitlines()[-1])["first_token"]["ratio"] > 0
    packed = [matrix.name for matrix in stored_matrices(tmp_path / "tiny-int8", kind="int8") if matrix.kind]
    assert "language.lm_head" in packed
    written = (tmp_path / "tiny-int8" / "config.json").stat().st_mtime_ns
    again = run(*QUICK, "--quantize", "int8", "--folder", str(tmp_path / "tiny"))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "tiny-int8" / "config.json").stat().st_mtime_ns == written, "kept beside, and taken"


def test_a_number_that_cannot_be_meant() -> None:
    done = run("--tokens", "1")
    assert done.returncode == 2
    assert "--tokens must be at least 2, not 1" in done.stderr
