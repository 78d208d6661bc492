"""Classes of a GPU: experts that few tokens read where they lie, blocks that torch compiles."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import seekvl
from seekvl.engine.gpu import layers
from seekvl.engine.gpu.decoder import StaticDecoder
from seekvl.engine.gpu.layers import (
    MOST_SLOTS,
    CompiledSamBlock,
    CompiledSiglipBlock,
    GpuExperts,
    accelerate_on_gpu,
)
from seekvl.engine.gpu.switch import Compiled
from seekvl.engine.kernels.accelerate import accelerate
from seekvl.models import sam, siglip
from seekvl.models.moe import Experts
from tests.engine.gpu.conftest import CUDA, Place
from tests.engine.gpu.test_decoder import filled, load, reference

GOLDEN = Path(__file__).parents[2] / "golden"


def kinds(model: nn.Module) -> set[type[nn.Module]]:
    """Which of the exchanged classes a network is made of."""
    known = (Experts, GpuExperts, siglip.Block, CompiledSiglipBlock, sam.Block, CompiledSamBlock)
    return {type(module) for module in model.modules()} & set(known)


def test_a_cpu_keeps_its_classes() -> None:
    model = load("vl2-small-like").model
    before = kinds(model)
    assert accelerate_on_gpu(model) is None
    assert accelerate_on_gpu(model, "eager") == "eager"
    assert kinds(model) == before


def test_levels_of_a_gpu_have_theirs_and_give_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tiled, padded = load("vl2-small-like").model, load("vl1-hybrid").model
    for model in (tiled, padded):
        accelerate(model.language, level="off")
    monkeypatch.setattr(layers, "choose_gpu_level", lambda _device, level: level)
    monkeypatch.setattr(layers, "_grouped", lambda _device: False)
    for level, wanted in (
        ("compiled", {GpuExperts, CompiledSiglipBlock, CompiledSamBlock}),
        ("graphs", {GpuExperts, siglip.Block, sam.Block}),
        ("eager", {Experts, siglip.Block, sam.Block}),
    ):
        for model in (tiled, padded):
            assert accelerate_on_gpu(model, level) == level
        assert {kind for model in (tiled, padded) for kind in kinds(model)} >= wanted - {siglip.Block}
        assert kinds(tiled) <= wanted
    accelerate(tiled.language)
    accelerate_on_gpu(tiled, "graphs")
    assert Experts not in kinds(tiled), "experts that were on the CPU before"


@pytest.mark.parametrize("tokens", [1, 3, 8, 40, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_experts_equal_those_of_torch(tokens: int, dtype: torch.dtype, device: str) -> None:
    plain = next(module for module in load("vl2-small-like").model.modules() if isinstance(module, Experts))
    plain.__class__ = Experts
    count, _, width = plain.gate_proj.shape
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator)
    experts = torch.rand(tokens, count, generator=generator).argsort(dim=1)[:, :3]
    weights = torch.rand(tokens, 3, generator=generator)
    assert (experts.numel() <= MOST_SLOTS) == (tokens <= 8)
    with torch.inference_mode():
        wanted = plain(x, experts=experts, weights=weights)
        fast = plain.to(device, dtype)
        fast.__class__ = GpuExperts
        fast.recordable = layers._grouped(torch.device(device))
        found = fast(x.to(device, dtype), experts=experts.to(device), weights=weights.to(device))
    bound = (1e-4 if dtype == torch.float32 else 2e-2) * wanted.abs().max()
    assert (found.float().cpu() - wanted).abs().max() < bound


def test_what_a_grouped_product_makes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that would wait go slot by slot; prompts may wait."""
    experts = next(module for module in load("vl2-small-like").model.modules() if isinstance(module, Experts))
    experts.__class__ = GpuExperts
    half = torch.zeros(64, 1, dtype=torch.bfloat16)
    experts.to(torch.bfloat16).recordable = True
    assert not experts._waits(half)
    assert experts._waits(half.float()), "a dtype it has no product for"
    assert not experts._waits(torch.zeros(65, 1)), "more rows than a step has"
    monkeypatch.setattr(layers, "aligned", lambda *_weights: False)
    assert experts._waits(half), "widths it does not take"
    monkeypatch.undo()
    experts.recordable = False
    assert experts._waits(half), "a GPU without it"


def counted(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Let torch trace as for a GPU, and run what it traced without a compiler; count the traces."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    layers._compiled.cache_clear()
    return counter


@pytest.mark.parametrize("name", ["vl1-siglip", "vl2-small-like"])
def test_one_trace_serves_all_layers_of_a_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = counted(monkeypatch)
    vlm = seekvl.load(GOLDEN / name, device="cpu", dtype="bfloat16")
    accelerate(vlm.model.language, level="off")
    plain, decoder = (StaticDecoder(vlm.model, level=level) for level in ("eager", "compiled"))
    expected, found = filled(vlm), filled(vlm)
    with torch.inference_mode():
        for slots in ([0], [2, 3], [5]):
            wanted = plain.step([5, 6][: len(slots)], cache=expected, slots=slots)
            assert torch.equal(decoder.step([5, 6][: len(slots)], cache=found, slots=slots), wanted)
    assert isinstance(decoder._before, Compiled)
    assert isinstance(decoder._after, Compiled)
    assert None not in (decoder._before._fast, decoder._after._fast), "a trace broke off"
    feed_forwards = {type(layer.mlp) for layer in vlm.model.language.layers}
    assert counter.frame_count == 2 * (1 + len(feed_forwards)), "of two buckets: before, after of each kind"


@pytest.mark.parametrize("name", ["vl2-small-like", "vl1-hybrid"])
def test_blocks_are_traced_for_powers_of_two(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = counted(monkeypatch)
    vision = load(name).model.vision
    towers = [module for module in vision.modules() if isinstance(module, siglip.Siglip | sam.Sam)]
    with torch.inference_mode():
        for tower in towers:
            x = torch.randn(5, *tower.pos_embed.shape[1:])
            wanted = tower.transform(x)
            own = type(tower.blocks[0])
            for block in tower.blocks:
                block.__class__ = CompiledSiglipBlock if own is siglip.Block else CompiledSamBlock
            found = tower.transform(x)
            for mine, theirs in zip(_sides(found), _sides(wanted), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
            assert layers._compiled(own)._fast is not None, "a trace broke off"
    assert 2 * len(towers) <= counter.frame_count <= 4 * len(towers), "of 4 and 1 views, windows and whole"


def _sides(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", ["vl2-small-like", "vl1-hybrid"])
def test_compiled_towers_see_what_plain_ones_do(name: str, fast: Place) -> None:
    plain, vlm = reference(name), load(name, fast.device)
    accelerate_on_gpu(vlm.model, fast.level)
    picture = str(GOLDEN / "images" / "grad_224x160.png")
    inputs = plain.processor([{"role": "user", "content": "See.", "images": [picture]}])
    from seekvl.engine.pictures import encode_picture

    found, wanted = (encode_picture(one.model, inputs, index=0).cpu() for one in (vlm, plain))
    assert (found - wanted).abs().max() < fast.atol * max(1.0, float(wanted.abs().max()))
