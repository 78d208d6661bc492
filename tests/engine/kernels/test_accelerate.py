import copy
import json
import logging
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import seekvl
from seekvl.engine import forward as steps
from seekvl.engine.cache import KVCache
from seekvl.engine.forward import embed_prompt, prefill, step
from seekvl.engine.generate import generate
from seekvl.engine.kernels import accelerate as room
from seekvl.engine.kernels import compiled
from seekvl.engine.kernels.accelerate import (
    KERNELS,
    LEARNERS,
    LEARNING,
    MOST_ROWS,
    KernelExperts,
    KernelLinear,
    KernelQuantizedLinear,
    accelerate,
)
from seekvl.engine.kernels.compiled import LEVELS, SWITCH, Library
from seekvl.engine.kernels.products import MAX_ROWS
from seekvl.engine.request import Request, SamplingParams
from seekvl.models.moe import Experts, MoeConfig
from seekvl.models.quantized import KINDS, QuantizedLinear, quantized_modules
from seekvl.models.vl import VL
from seekvl.models.vl2 import AnyVL, on_meta
from seekvl.processing.encode import ModelInput
from seekvl.runtime import SeekVLError
from seekvl.weights import quantize
from seekvl.weights.load import load_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDERS = ("vl1-siglip", "vl2-tiny-like", "vl2-small-like", "vl2-base-like")
PROMPTS = {"vl1-siglip": ("single", "text_only"), "vl2": ("wide", "text_only")}


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)


@cache
def load(folder: str, dtype: str = "float32") -> seekvl.VLM:
    return seekvl.load(GOLDEN / folder, device="cpu", dtype=dtype, preprocessing="official")


def names(folder: str) -> tuple[str, ...]:
    return PROMPTS.get(folder, PROMPTS["vl2"])


@cache
def encode(folder: str, name: str) -> ModelInput:
    cases = json.loads((GOLDEN / folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    content = next(case for case in cases if case["name"] == name)
    turns = [
        turn | {"images": [str(GOLDEN / "images" / f"{image}.png") for image in turn.get("images", [])]}
        for turn in content["conversation"]
    ]
    return load(folder).processor(turns)


def greedy(vlm: seekvl.VLM, *prompts: ModelInput) -> list[list[int]]:
    requests = [Request(inputs=inputs, params=SamplingParams(max_new_tokens=16)) for inputs in prompts]
    pieces = generate(vlm.model, vlm.tokenizer, requests=requests)
    done = {index: piece.completion for index, piece in pieces if piece.completion is not None}
    return [list(done[index].token_ids) for index in range(len(requests))]


def classes(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


class Calls:
    """Counts what goes through the kernels, which still do the work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = {"raw_linear": 0, "raw_experts": 0}
        """Of answers."""
        self.lessons = {"raw_learning_experts": 0}
        for counts in (self.counts, self.lessons):
            for name in counts:
                monkeypatch.setattr(room, name, self._counted(counts, name, getattr(room, name)))

    def _counted(
        self, counts: dict[str, int], name: str, function: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        def call(*args: Any, **more: Any) -> Tensor:
            counts[name] += 1
            return function(*args, **more)

        return call

    @property
    def learnt(self) -> int:
        return sum(self.lessons.values())


def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch walk through the layers, as where one call cannot serve a network."""
    for name in ("decode", "append_prompt", "prompt_hidden", "prompt_logits"):
        monkeypatch.setattr(steps, name, lambda *_, **__: None)


@pytest.mark.parametrize("way", ["whole", "layers"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_greedy_answers_are_the_golden_ones(
    folder: str, way: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt and every decoding step in one call, or every product of them however small through the
    kernels; alone and in a batch of up to eight rows.
    """
    vlm, golden = load(folder), load_file(GOLDEN / folder / "cases.safetensors")
    accelerate(vlm.model.language, level=level, smallest=0)
    if way == "layers":
        layer_by_layer(monkeypatch)
    wanted = [golden[f"{name}/generated_ids"][0].tolist() for name in names(folder)]
    prompts = [encode(folder, name) for name in names(folder)]
    assert [greedy(vlm, inputs)[0] for inputs in prompts] == wanted
    assert greedy(vlm, *prompts * 4) == wanted * 4


@pytest.mark.parametrize("way", ["whole", "layers"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_bfloat16_decodes_as_near_to_float32_as_torch_does(
    folder: str, way: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerances are those of the whole network in bfloat16, see tests/parity."""
    if way == "layers":
        layer_by_layer(monkeypatch)
    half, full, inputs = load(folder, "bfloat16"), load(folder), encode(folder, "text_only")
    logits = {}
    for vlm, name in ((full, "off"), (half, "off"), (half, level)):
        accelerate(vlm.model.language, level=name, smallest=0)
        held = KVCache(vlm.config.language, rows=1, device=vlm.device, dtype=vlm.dtype)
        prefill(vlm.model, inputs, cache=held, row=0)
        held.reserve(len(inputs.input_ids) + 3)
        steps = [step(vlm.model, [token], cache=held, slots=[0]) for token in (5, 6, 7)]
        logits[vlm.dtype, name] = torch.cat(steps)
    wanted = logits[torch.float32, "off"]
    theirs, ours = ((logits[torch.bfloat16, name] - wanted).abs() for name in ("off", level))
    assert ours.mean() < max(0.06, 1.25 * float(theirs.mean()))
    assert ours.max() < max(0.4, 1.25 * float(theirs.max()))


@pytest.mark.parametrize("folder", ["vl1-siglip", "vl2-tiny-like"])
def test_what_runs_through_the_kernels(folder: str, native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and step whole; layer by layer where they cannot be; then of a prompt what gains, at least the
    head.
    """
    vlm, inputs = load(folder), encode(folder, "text_only")
    accelerate(vlm.model.language, smallest=0)
    calls = Calls(monkeypatch)
    held = KVCache(vlm.config.language, rows=1, device=vlm.device, dtype=vlm.dtype)
    if native.levels[-1] in MOST_ROWS:
        prefill(vlm.model, inputs, cache=held, row=0)
        assert calls.counts == {"raw_linear": 0, "raw_experts": 0}
        held.truncate(0, 0)
    handle = vlm.model.language.layers[0].register_forward_hook(lambda *_: None)
    prefill(vlm.model, inputs, cache=held, row=0)
    handle.remove()
    modules = list(vlm.model.language.modules())
    linears = sum(isinstance(module, nn.Linear) for module in modules)
    experts = sum(isinstance(module, Experts) for module in modules)
    gains = MOST_ROWS.get(native.levels[-1], {})
    short = len(inputs.input_ids) <= gains.get(torch.float32, MAX_ROWS)
    prompt = {"raw_linear": linears if short else 1, "raw_experts": experts if gains else 0}
    assert calls.counts == prompt  # of the last position only where it is the head
    held.reserve(len(inputs.input_ids) + 1)
    whole = step(vlm.model, [5], cache=held, slots=[0])
    assert calls.counts == prompt
    held.truncate(0, held.lengths[0] - 1)
    handle = vlm.model.language.layers[0].register_forward_hook(lambda *_: None)
    try:
        single = step(vlm.model, [5], cache=held, slots=[0])
    finally:
        handle.remove()
    assert calls.counts == {
        "raw_linear": prompt["raw_linear"] + linears,
        "raw_experts": prompt["raw_experts"] + experts,
    }
    assert (whole - single).abs().max() < 1e-4
    assert held.lengths == [len(inputs.input_ids) + 1]


def test_a_model_of_somebody_else_steps_as_it_says(native: Library) -> None:
    class Louder(VL):
        """Whose logits are not those of its language model."""

        def head(self, hidden: Tensor) -> Tensor:
            return 2 * super().head(hidden)

    model = load_checkpoint(GOLDEN / "vl1-siglip", device="cpu", dtype="float32").model
    accelerate(model.language)
    logits = []
    for kind in (VL, Louder):
        model.__class__ = kind
        held = KVCache(model.config.language, rows=1, device=torch.device("cpu"), dtype=torch.float32)
        held.reserve(1)
        logits.append(step(model, [5], cache=held, slots=[0]))
    assert torch.allclose(logits[1], 2 * logits[0], atol=1e-4)


def test_gradients_and_autocast_stay_as_they_were(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_checkpoint(GOLDEN / "vl2-tiny-like", device="cpu", dtype="float32").model
    model = copy.deepcopy(plain)
    accelerate(model.language, smallest=0)
    calls = Calls(monkeypatch)
    short, ids = torch.arange(4)[None], torch.arange(12)[None]
    for network in (model, plain):
        network.requires_grad_(True)
        network(short).square().mean().backward()
    for ours, theirs in zip(model.language.parameters(), plain.language.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(short), plain(short))
        assert torch.equal(model(ids), plain(ids))
    assert calls.counts == {"raw_linear": 0, "raw_experts": 0}
    assert calls.learnt == 0


def test_small_weights_stay_with_torch(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    for dtype, smallest in room.SMALLEST.items():
        for rows, served in (
            (smallest // dtype.itemsize // 64 - 1, 0),
            (smallest // dtype.itemsize // 64, 1),
        ):
            layer = nn.Linear(64, rows, bias=True, dtype=dtype).requires_grad_(False)
            x = torch.randn(1, 64).to(dtype)
            wanted = layer(x)
            layer.__class__ = KernelLinear
            assert isinstance(layer, KernelLinear)
            layer.level, layer.smallest = 0, None
            calls.counts["raw_linear"] = 0
            with torch.no_grad():
                found = layer(x)
            assert calls.counts["raw_linear"] == served
            assert torch.allclose(found.float(), wanted.float(), atol=1e-2 if dtype.itemsize == 2 else 1e-6)


def test_parameters_names_and_files_are_the_same(native: Library, tmp_path: Path) -> None:
    model = load_checkpoint(GOLDEN / "vl2-small-like", device="cpu", dtype="float32").model
    before, own = dict(model.named_parameters()), classes(model)
    state = list(model.state_dict())
    assert accelerate(model.language) == native.levels[-1]
    assert list(model.state_dict()) == state
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    changed = {name for name, kind in classes(model).items() if kind is not own[name]}
    assert {own[name] for name in changed} == {nn.Linear, Experts}
    assert all(name.startswith("language.") for name in changed)
    assert accelerate(model.language, level="off") is None
    assert classes(model) == own


def test_copies_and_pickles(native: Library) -> None:
    layer = nn.Linear(40, 30).requires_grad_(False)
    layer.__class__ = KernelLinear
    assert isinstance(layer, KernelLinear)
    layer.level, layer.smallest = 0, 0
    x = torch.randn(2, 40)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is KernelLinear
        with torch.no_grad():
            assert torch.equal(other(x), layer(x))


def test_weights_may_move_and_change_their_dtype(native: Library) -> None:
    model: AnyVL = load_checkpoint(GOLDEN / "vl1-siglip", device="cpu", dtype="float32").model
    accelerate(model.language, smallest=0)
    ids = torch.arange(3)[None]
    with torch.no_grad():
        full = model(ids)
        half = model.to(torch.bfloat16)(ids)
        double = model.to(torch.float64)(ids)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.4
    assert double.dtype == torch.float64
    assert model.to("meta")(ids.to("meta")).is_meta


def test_layers_of_others_and_other_devices_are_left_alone(native: Library) -> None:
    class Adapted(nn.Linear):
        """Somebody's own."""

    model = load_checkpoint(GOLDEN / "vl1-siglip", device="cpu", dtype="float32").model
    head = model.language.lm_head
    head.__class__ = Adapted
    accelerate(model.language)
    assert type(head) is Adapted
    assert classes(model)["language.layers.0.mlp.up_proj"] is KernelLinear
    meta = on_meta(model.config)
    own = classes(meta)
    assert accelerate(meta.language) is None
    assert classes(meta) == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_layers_take_the_rows_they_gain_by(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    layer = nn.Linear(24, 40, dtype=dtype).requires_grad_(False)
    accelerate(layer, level=level, smallest=0)
    most = MOST_ROWS.get(level, {}).get(dtype, MAX_ROWS)
    for rows, served in ((200, 1),) if most > 200 else ((most, 1), (most + 1, 0)):
        calls.counts["raw_linear"] = 0
        x = torch.randn(2, rows // 2, 24).to(dtype) if rows % 2 == 0 else torch.randn(rows, 24).to(dtype)
        with torch.no_grad():
            found, wanted = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
        assert calls.counts["raw_linear"] == served
        assert torch.allclose(found.float(), wanted.float(), atol=1e-2 if dtype.itemsize == 2 else 1e-6)


def test_rows_of_another_width_are_refused(native: Library) -> None:
    layer = nn.Linear(24, 40).requires_grad_(False)
    accelerate(layer, smallest=0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.ones(4, 23))


def test_experts_take_prompts_at_levels_that_gain(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_checkpoint(GOLDEN / "vl2-tiny-like", device="cpu", dtype="float32").model
    accelerate(model.language, level=level, smallest=0)
    calls = Calls(monkeypatch)
    experts = next(module for module in model.modules() if isinstance(module, KernelExperts))
    d = experts.gate_proj.shape[2]
    for n, served in ((8, 1), (9, 1 + (level not in ("portable", "neon")))):
        x, chosen, weights = torch.randn(n, d), torch.zeros(n, 2, dtype=torch.int64), torch.rand(n, 2)
        with torch.no_grad():
            found = experts(x, experts=chosen, weights=weights)
            wanted = Experts.forward(experts, x, experts=chosen, weights=weights)
        assert torch.allclose(found, wanted, atol=1e-5, rtol=0)
        assert calls.counts["raw_experts"] == served


def routed(n: int, *, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that need a gradient, their experts of 4 and weights that need one."""
    generator = torch.Generator().manual_seed(n)
    x, weights = torch.randn(n, d, generator=generator), torch.rand(n, 2, generator=generator)
    experts = torch.randint(0, 4, (n, 2), generator=generator)
    return x.to(dtype).requires_grad_(), experts, weights.requires_grad_()


def experts_of(dtype: torch.dtype = torch.float32, *, d: int = 40, m: int = 24) -> Experts:
    torch.manual_seed(0)
    config = MoeConfig(experts=4, active=2, shared=0, width=m, scoring="softmax", choice="greedy")
    return Experts(d, config).to(dtype)


def learnt(model: Experts, x: Tensor, experts: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and all gradients of a step that asks each output to be its own half."""
    model.zero_grad()
    x, weights = (tensor.detach().requires_grad_() for tensor in (x, weights))
    y = model(x, experts=experts, weights=weights)
    y.float().square().sum().backward()
    return [y.detach(), *(tensor.grad.clone() for tensor in (x, weights, *model.parameters()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_experts_learn_at_levels_that_gain_as_torch_lets_them(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to eight tokens stay with torch."""
    model, calls = experts_of(dtype), Calls(monkeypatch)
    for n, served in ((8, 0), (9, 1), (60, 1)):
        given = routed(n, d=40, dtype=dtype)
        accelerate(model, level="off")
        wanted = learnt(model, *given)
        accelerate(model, level=level, kernels=LEARNERS)
        before = calls.learnt
        found = learnt(model, *given)
        assert calls.learnt - before == served * (dtype in LEARNING.get(level, ()))
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == theirs.dtype
            share = (ours.float() - theirs.float()).norm() / theirs.float().norm()
            assert share < (2e-6 if dtype == torch.float32 else 0.02)


def test_autocast_learns_in_its_dtype_into_gradients_of_float32(
    native: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given, results = experts_of(), routed(40, d=40), []
    half = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in given[:1]]
    for x in (given[0], half[0]):
        for name in ("off", None):
            accelerate(model, level=name)
            calls = Calls(monkeypatch)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                results.append(learnt(model, x, *given[1:]))
            assert calls.learnt == (name is None)
            monkeypatch.undo()
            assert results[-1][0].dtype == torch.bfloat16
            assert {tensor.dtype for tensor in results[-1][2:]} == {torch.float32}
        for theirs, ours in zip(results[-2], results[-1], strict=True):
            assert theirs.dtype == ours.dtype
            assert (theirs.float() - ours.float()).norm() < 0.02 * theirs.float().norm()


def test_what_the_kernels_cannot_teach_torch_does(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, weights in another dtype than the inputs, turned stacks, and nothing that needs a gradient."""
    calls = Calls(monkeypatch)
    model = experts_of(torch.float64, d=5, m=3)
    accelerate(model, level=None)
    x, experts, weights = routed(10, d=5, dtype=torch.float64)

    def outputs(x: Tensor, weights: Tensor, *stacks: Tensor) -> Tensor:
        names = [name for name, _ in model.named_parameters()]
        given = dict(zip(names, stacks, strict=True))
        more = {"experts": experts, "weights": weights}
        return torch.func.functional_call(model, given, (x,), more)

    assert torch.autograd.gradcheck(
        outputs, (x, weights.detach().double().requires_grad_(), *model.parameters())
    )
    model = experts_of()
    accelerate(model)
    x, experts, weights = routed(20, d=40)
    wanted = learnt(model, x, experts, weights)
    assert calls.learnt == 1
    with torch.no_grad():
        model.down_proj.data = model.down_proj.mT.contiguous().mT
    for found, right in zip(learnt(model, x, experts, weights), wanted, strict=True):
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-6)
    frozen = experts_of().requires_grad_(False)
    accelerate(frozen)
    frozen(x.detach(), experts=experts, weights=weights.detach())
    assert calls.learnt == 1


def test_hooks_and_clipping_see_the_gradients_of_experts(native: Library) -> None:
    model, given = experts_of(), routed(20, d=40)
    accelerate(model)
    seen: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.update({name: p.grad.clone()}) if p.grad is not None else None
        )
    learnt(model, *given)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(seen[name], parameter.grad)
    norm = torch.cat([gradient.flatten() for gradient in seen.values()]).norm()
    assert torch.allclose(nn.utils.clip_grad_norm_(model.parameters(), 1e-3), norm)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert torch.allclose(clipped, torch.tensor(1e-3), rtol=1e-3)


def test_recomputed_layers_learn_the_same(native: Library) -> None:
    model, (x, experts, weights) = experts_of(), routed(20, d=40)
    accelerate(model)
    wanted = learnt(model, x, experts, weights)
    model.zero_grad()
    source = x.detach().requires_grad_()
    checkpoint(model, source, experts=experts, weights=weights, use_reentrant=False).square().sum().backward()
    found = [source.grad, *(parameter.grad for parameter in model.parameters())]
    for ours, right in zip(found, [wanted[1], *wanted[3:]], strict=True):
        assert ours is not None
        assert torch.equal(ours, right)


def test_the_object_users_hold_says_what_decodes(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load("vl1-siglip")
    assert seekvl.VLM(vlm.model, vlm.processor).kernels == native.levels[-1]
    monkeypatch.setenv(SWITCH, "portable")
    assert seekvl.VLM(vlm.model, vlm.processor).kernels == "portable"
    assert vlm.model.language.lm_head.level == LEVELS.index("portable")
    monkeypatch.setenv(SWITCH, "off")
    assert seekvl.VLM(vlm.model, vlm.processor).kernels is None
    assert not {type(module) for module in vlm.model.modules()} & set(KERNELS.values())


def test_a_prompt_of_pictures_is_embedded_by_torch(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load("vl1-siglip")
    accelerate(vlm.model.language, smallest=0)
    calls = Calls(monkeypatch)
    embed_prompt(vlm.model, encode("vl1-siglip", "single"))
    assert calls.counts == {"raw_linear": 0, "raw_experts": 0}


# Quantised layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["vl1-siglip", "vl2-tiny-like", "vl2-base-like"])
def test_quantised_models_compute_as_torch_unpacks_them(folder: str, kind: str, level: str) -> None:
    """An input on the border of two steps may fall either way, where sums were added in another order."""
    model = load_checkpoint(GOLDEN / folder, device="cpu", dtype="float32", quantize=kind).model
    logits = {}
    for name in ("off", level):
        accelerate(model.language, level=name)
        with torch.no_grad():
            logits[name] = model(torch.arange(12)[None])
    assert (logits[level] - logits["off"]).norm() < 0.01 * logits["off"].norm()
    assert not torch.equal(logits[level], logits["off"]), "the kernels add in another order"


def test_quantised_layers_of_all_parts_find_their_kernels(
    native: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "OUTPUT_LIMIT", 1.0)
    vlm = seekvl.load(GOLDEN / "vl1-siglip", device="cpu", quantize="int8")
    kinds = {
        name.partition(".")[0]: type(vlm.model.get_submodule(name)) for name in quantized_modules(vlm.model)
    }
    assert kinds == dict.fromkeys(("vision", "adaptor", "language"), KernelQuantizedLinear)
    monkeypatch.setenv(SWITCH, "off")
    assert seekvl.VLM(vlm.model, vlm.processor).kernels is None
    assert {type(module) for module in quantized_modules(vlm.model).values()} == {QuantizedLinear}
    monkeypatch.setenv(SWITCH, "portable")
    assert seekvl.VLM(vlm.model, vlm.processor).kernels == "portable"
    assert {type(module) for module in quantized_modules(vlm.model).values()} == {KernelQuantizedLinear}


def test_a_plain_tower_keeps_its_layers(native: Library) -> None:
    vlm = load("vl1-siglip")
    assert {type(module) for module in vlm.model.vision.modules()}.isdisjoint(KERNELS.values())


def test_a_quantised_model_answers_without_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for cached in (compiled.library, compiled._warn):
        cached.cache_clear()
    monkeypatch.setattr(compiled, "PATH", tmp_path / "native.so")
    try:
        with caplog.at_level(logging.WARNING, logger="seekvl"):
            vlm = seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="bfloat16", quantize="int4")
            assert vlm.kernels is None
            assert vlm.chat("Hello", max_new_tokens=2).usage.completion_tokens > 0
    finally:
        for cached in (compiled.library, compiled._warn):
            cached.cache_clear()
    assert len(caplog.records) == 1


def test_quantised_layers_leave_gradients_and_autocast_to_torch(native: Library) -> None:
    model = load_checkpoint(GOLDEN / "vl1-siglip", device="cpu", dtype="float32", quantize="int8").model
    accelerate(model.language)
    x = torch.randn(1, model.config.language.width, requires_grad=True)
    with pytest.raises(SeekVLError, match="gives no gradient"):
        model.language.lm_head(x)
    with torch.no_grad():
        plain = model.language.lm_head(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.language.lm_head(x)
    assert torch.allclose(found.float(), plain, rtol=0.02, atol=0.02 * float(plain.abs().max()))
