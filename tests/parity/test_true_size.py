"""DeepSeek-VL2-tiny at its true dimensions, with random weights, through a file: 3.4 billion parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from seekvl.evals.random_weights import write_random
from seekvl.presets import CHECKPOINTS, SHORT_NAMES

GOLDEN = Path(__file__).parents[1] / "golden"
SPARE = 1.0
"""GiB beside the weights: torch itself, activations of three tiles, the cache."""

ASK = """
import json, sys
from pathlib import Path
import seekvl
folder, picture = sys.argv[1:]
vlm = seekvl.load(folder, device="cpu", dtype="bfloat16", max_tiles=2)
answer = vlm.ask(picture, "What is written here?", max_new_tokens=6)
status = Path("/proc/self/status").read_text()
peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
said = {
    "ids": answer.token_ids, "peak": peak / 2**20, "image_tokens": answer.usage.image_tokens,
    "weights": sum(p.nbytes for p in vlm.model.parameters()) / 2**30,
    "seconds": {name: getattr(answer.timings, name) for name in ("vision", "prefill", "decode")},
}
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_tiny_answers_within_its_weights_and_little_more(tmp_path: Path) -> None:
    write_random(CHECKPOINTS[SHORT_NAMES["deepseek-vl2-tiny"]], tmp_path / "tiny")
    picture = GOLDEN / "images" / "text_320x200.png"
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path / "tiny"), str(picture)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    print(said)
    assert said["weights"] == pytest.approx(6.28, abs=0.05)
    assert said["image_tokens"] >= 421
    assert 1 <= len(said["ids"]) <= 6
    assert said["peak"] <= said["weights"] + SPARE
