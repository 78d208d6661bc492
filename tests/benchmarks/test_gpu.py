"""The benchmark of GPUs, run on a CPU with miniatures: what it counts is counted there as well."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu

from seekvl.engine.plan import find_config
from seekvl.evals.ceilings import Ceilings
from seekvl.presets import VL2_SMALL, VL_1B, Preset

GOLDEN = Path(__file__).parents[1] / "golden"
CEILINGS = Ceilings(threads=1, read=1e9, reader="copy", operations={"bfloat16": 1e11})
CPU = torch.device("cpu")


def small(kind: Preset, folder: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the benchmark find a preset of this kind with the dimensions of a miniature."""
    config = find_config(GOLDEN / folder)
    monkeypatch.setitem(gpu.CHECKPOINTS, "small", replace(kind, model=config.model, image=config.image))
    tokenizer = GOLDEN / folder / "tokenizer.json"
    monkeypatch.setattr(gpu, "TOKENIZERS", {False: tokenizer, True: tokenizer})
    return "small"


@pytest.mark.parametrize(("kind", "folder"), [(VL_1B, "vl1-siglip"), (VL2_SMALL, "vl2-small-like")])
def test_a_model_made_on_the_device(kind: Preset, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = small(kind, folder, monkeypatch)
    peer = folder == "vl1-siglip"
    if peer:
        pytest.importorskip("transformers")
    found = gpu.measure(name, None, device=CPU, batches=[1, 3], tokens=4, peer=peer, long=5, found=CEILINGS)
    assert found.decode.keys() == found.share.keys() == {1, 3}
    assert min(*found.decode.values(), *found.share.values()) > 0
    assert 0 < found.first_token < found.long_answer
    assert found.large_tokens > 54
    assert found.peer.keys() == ({1, 3} if peer else set())
    text = gpu.table(found, long=5)
    assert text.count("tok/s") == 2
    assert ("transformers" in text) == peer


def test_quantised_weights_count_with_the_bytes_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="the extra gpu is not installed")
    vlm, config = gpu.make(gpu.CHECKPOINTS[small(VL_1B, "vl1-siglip", monkeypatch)], device=CPU)
    assert gpu.saved_bytes(vlm.model.language) == 0
    plain = gpu.shares(vlm, config, {1: 100.0}, tokens=4, prompt=99, found=CEILINGS)
    whole = sum(one.weight.nbytes for one in vlm.model.language.modules() if isinstance(one, torch.nn.Linear))
    gpu.quantize_on_gpu(vlm.model, "int8")
    assert 0.4 * whole < gpu.saved_bytes(vlm.model.language) <= 0.5 * whole
    assert gpu.shares(vlm, config, {1: 100.0}, tokens=4, prompt=99, found=CEILINGS)[1] < plain[1]
