"""torchao's weights: on the CPU as far as torchao computes there, on a GPU all of them."""

import copy
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import seekvl
from seekvl.engine.cache import KVCache
from seekvl.engine.forward import prefill, step
from seekvl.engine.gpu.decoder import StaticDecoder, static_decoder
from seekvl.engine.kernels.accelerate import accelerate
from seekvl.runtime import SeekVLError
from seekvl.weights.weight_only import GPU_KINDS, gpu_kind, quantize_on_gpu
from tests.engine.gpu.conftest import CUDA

GOLDEN = Path(__file__).parents[1] / "golden"
ERROR = {"int8": 0.02, "fp8": 0.05, "int4": 0.2}
"""Largest error of a layer's outputs, relative to their norm."""
CASES = [
    *(pytest.param("cpu", kind, id=f"cpu-{kind}") for kind in ("int8", "fp8")),
    *(pytest.param("cuda", kind, id=f"cuda-{kind}", marks=CUDA) for kind in GPU_KINDS),
]


def load(name: str, *, device: str = "cpu", dtype: str = "bfloat16") -> seekvl.VLM:
    folder = GOLDEN / name
    vlm = seekvl.load(folder if folder.exists() else name, device=device, dtype=dtype)
    accelerate(vlm.model.language, level="off")
    return vlm


@pytest.mark.parametrize("name", ["seekvl-nano", "seekvl-nano-moe"])
@pytest.mark.parametrize(("device", "kind"), CASES)
def test_layers_stay_near_and_steps_equal_those_of_torch(name: str, device: str, kind: str) -> None:
    pytest.importorskip("torchao", reason="the extra gpu is not installed")
    dtype = "bfloat16" if kind == "int4" else "float32"  # int4 has no other
    plain, vlm = (load(name, device=device, dtype=dtype) for _ in range(2))
    told: list[tuple[int, int]] = []
    quantize_on_gpu(vlm.model, gpu_kind(kind), progress=lambda done, of: told.append((done, of)))
    assert told[-1][0] == told[-1][1] == len(told) > 0
    turned = {
        name.rpartition(".")[2]
        for name, module in vlm.model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor
    }
    assert turned >= {"q_proj", "o_proj", "down_proj", "lm_head"}
    assert "kv_b_proj" not in turned
    logits = []
    with torch.inference_mode():
        for one in (plain, vlm):
            held = KVCache(one.config.language, rows=2, device=one.device, dtype=one.dtype)
            prefill(one.model, one.processor("Say it."), cache=held, row=1)
            held.reserve(held.lengths[1] + 1)
            logits.append(step(one.model, [7], cache=held, slots=[1])[0].cpu())
        assert not torch.equal(*logits)
        for name, layer in plain.model.language.named_modules():
            if isinstance(layer, nn.Linear):
                x = torch.randn(5, layer.in_features, device=device, dtype=plain.dtype)
                wanted, got = layer(x), vlm.model.language.get_submodule(name)(x)
                assert (got - wanted).norm() <= ERROR[kind] * wanted.norm(), name
        held.truncate(1, held.lengths[1] - 1)
        decoder = static_decoder(vlm.model, "eager")
        assert isinstance(decoder, StaticDecoder)
        again = decoder.step([7], cache=held, slots=[1])[0].cpu()
    assert again.isfinite().all()
    if dtype == "float32":  # in bfloat16 a router may choose another expert
        assert (again - logits[1]).abs().max() < 1e-3


def test_experts_stay_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torchao", reason="the extra gpu is not installed")
    model = copy.deepcopy(load("vl2-small-like").model)
    with caplog.at_level(logging.WARNING, logger="seekvl"):
        quantize_on_gpu(model, "int8")
    (said,) = [record.message for record in caplog.records if record.name == "seekvl"]
    assert said.startswith("int8 on a GPU turns linear layers")
    assert said.endswith("stay as they are")


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SeekVLError, match="quantize='int3' is unknown; a GPU has int8, int4, fp8"):
        gpu_kind("int3")
    with pytest.raises(SeekVLError, match="fp8 is a format of GPUs; a CPU has int8 and int4"):
        load_fp8()
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SeekVLError, match=r"needs the package torchao: pip install 'seekvl\[gpu\]'"):
        quantize_on_gpu(load("vl1-siglip").model, "int8")


def load_fp8() -> seekvl.VLM:
    return seekvl.load(GOLDEN / "vl1-siglip", device="cpu", quantize="fp8")


def test_int4_wants_bfloat16_and_whole_groups() -> None:
    pytest.importorskip("torchao", reason="the extra gpu is not installed")
    with pytest.raises(SeekVLError, match=r"int4 on a GPU computes in bfloat16, not in torch\.float32"):
        quantize_on_gpu(load("vl1-siglip", dtype="float32").model, "int4")
    with pytest.raises(SeekVLError, match=r"q_proj has 80 inputs; int4 on a GPU wants a multiple of 64"):
        quantize_on_gpu(load("vl1-siglip").model, "int4")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=CUDA) for kind in GPU_KINDS])
def test_a_loaded_model_answers(kind: str) -> None:
    pytest.importorskip("torchao", reason="the extra gpu is not installed")
    vlm = seekvl.load("seekvl-nano", device="cuda", dtype="bfloat16", quantize=kind)
    assert len(vlm.chat("Say it.", max_new_tokens=5).token_ids) > 0
