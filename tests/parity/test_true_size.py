"""DeepSeek-VL2-tiny at its true dimensions, with random weights, through a file: 3.4 billion parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seekvl.models.vl2 import VL2Config, on_meta
from seekvl.presets import CHECKPOINTS, SHORT_NAMES
from seekvl.runtime import torch_generator
from seekvl.weights.config import VL2_TOKENS, CheckpointConfig, SpecialTokens
from seekvl.weights.save import save_checkpoint

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
    write_random(tmp_path, "deepseek-vl2-tiny")
    picture = GOLDEN / "images" / "text_320x200.png"
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path), str(picture)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    print(said)
    assert said["weights"] == pytest.approx(6.28, abs=0.05)
    assert said["image_tokens"] >= 421
    assert 1 <= len(said["ids"]) <= 6
    assert said["peak"] <= said["weights"] + SPARE


@torch.no_grad()
def write_random(folder: Path, name: str) -> None:
    """Write a published checkpoint with random numbers in its official layout."""
    preset = CHECKPOINTS[SHORT_NAMES[name]]
    model = on_meta(preset.model).to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    generator = torch_generator(0, "true size")
    block = torch.empty(4_194_301).normal_(std=0.02, generator=generator).bfloat16()  # prime: nothing repeats
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        if parameter.dim() == 1:
            flat.fill_(1.0 if name.endswith("weight") else 0.0)
        for start in range(0, len(flat) if parameter.dim() > 1 else 0, len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block[: len(part)])
    second = isinstance(preset.model, VL2Config)
    config = CheckpointConfig(
        model=preset.model,
        image=preset.image,
        template=preset.template,
        specials=VL2_TOKENS if second else SpecialTokens(),
    )
    words = GOLDEN / ("vl2-tiny-like" if second else "vl1-hybrid") / "tokenizer.json"
    save_checkpoint(model, folder, config=config, tokenizer=words)
