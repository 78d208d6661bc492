"""Prompts with packed weights in one call a piece, beside the same layers one by one: tiny, of odd widths."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from seekvl.engine.kernels import prompts
from seekvl.engine.kernels.accelerate import accelerate
from seekvl.engine.kernels.compiled import LEVELS, Library
from seekvl.engine.kernels.packed import packed_linear
from seekvl.engine.kernels.prompts import prompt_hidden, prompts_served
from seekvl.models.quantized import Kind
from seekvl.weights.quantize import quantize_module
from tests.engine.kernels.test_decoder import CONFIGS, Network, build
from tests.engine.kernels.test_decoder_quantized import ALL_NAMES, EACH, kernels, quantize
from tests.engine.kernels.test_prompts import (
    HELD,
    PIECES,
    append,
    by_torch,
    embeds,
    exact_copy,
    held_by,
    hidden,
    logits,
    same,
)

PARTS = (
    *(("q_proj",), ("k_proj",), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)),
    *(("mlp",), ("experts",), ("shared",), ("lm_head",), ("layers.1",)),
)
"""What is packed of a network: each border between packed and plain numbers is met."""


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_GAINING", frozenset(range(len(LEVELS))))


def near(found: Tensor, wanted: Tensor) -> bool:
    """Whether rows differ by the order of sums, but for those where an input on the border between two whole
    numbers fell the other way, which is a hundredth of that input, or an expert was as good as another.
    """
    rows = (found - wanted).abs().amax(dim=1)
    return bool(rows.median() < 1e-5 and rows.quantile(0.9) < 0.05)


def partly(name: str, kind: Kind, parts: Sequence[str], *, dtype: torch.dtype = torch.float32) -> Network:
    network = build(CONFIGS[name], dtype=dtype)
    for part in parts:
        quantize(network, kind, only=part)
    return network


def in_pieces(network: Network, x: Tensor) -> tuple[Tensor, bool]:
    """Return what a prompt gives whole, and whether pieces of it give the same and leave the same cache."""
    whole, cut = held_by(network), held_by(network)
    wanted, start, parts = hidden(network, x, whole), HELD[1], []
    for part in torch.split(x, PIECES):
        parts.append(hidden(network, part, cut, start=start))
        start += len(part)
    return wanted, torch.equal(torch.cat(parts), wanted) and same(whole, cut)


@EACH
@ALL_NAMES
def test_float32_equals_the_network(name: str, kind: Kind, level: str) -> None:
    network, x = kernels(name, kind, level), embeds(CONFIGS[name].width, tokens=150)
    ours, theirs = held_by(network), held_by(network)
    assert near(hidden(network, x, ours), by_torch(network, x, theirs))
    for new, wanted in zip(*(cache.buffers for cache in (ours, theirs)), strict=True):
        assert all((a - b).abs().median() < 1e-5 for a, b in zip(new, wanted, strict=True))


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "small"])
def test_half_precision_is_nearer_to_float32_than_torch(
    name: str, kind: Kind, level: str, dtype: torch.dtype
) -> None:
    network = kernels(name, kind, level, dtype)
    x = embeds(CONFIGS[name].width, dtype, tokens=120)
    found = hidden(network, x, held_by(network))
    wide, exact = exact_copy(network)
    wanted = by_torch(wide, x.float(), exact)
    theirs = by_torch(network, x, held_by(network))
    assert (found - wanted).abs().mean() <= (theirs - wanted).abs().mean()


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ALL_NAMES
def test_pieces_change_no_bit(name: str, kind: Kind, level: str, dtype: torch.dtype) -> None:
    network, x = kernels(name, kind, level, dtype), embeds(CONFIGS[name].width, dtype)
    assert in_pieces(network, x)[1]


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "small"])
def test_any_part_may_be_packed_beside_plain_ones(
    native: Library, name: str, dtype: torch.dtype, parts: tuple[str, ...]
) -> None:
    network = partly(name, "int4", parts, dtype=dtype)
    accelerate(network)
    found, exact = in_pieces(network, embeds(CONFIGS[name].width, dtype))
    assert exact
    x = embeds(CONFIGS[name].width, dtype, tokens=100)
    wide, held = exact_copy(network)
    wanted = by_torch(wide, x.float(), held)
    if dtype == torch.float32:
        assert near(found[:100], wanted)
    else:
        assert (found[:100] - wanted).abs().mean() < 0.05


def test_both_kinds_in_one_layer(native: Library) -> None:
    """One input is rounded in two ways then, and given as it is to a third matrix."""
    network = partly("llama", "int8", ["q_proj", "gate_proj", "up_proj"])
    quantize(quantize(network, "int4", only="k_proj"), "int4", only="down_proj")
    accelerate(network)
    found, exact = in_pieces(network, embeds(CONFIGS["llama"].width))
    assert exact
    wanted = by_torch(network, embeds(CONFIGS["llama"].width), held_by(network))
    assert near(found, wanted)


@EACH
@pytest.mark.parametrize("name", ["llama, shared heads", "small"])
def test_what_is_not_asked_for_changes_no_bit(name: str, kind: Kind, level: str) -> None:
    network, x = kernels(name, kind, level), embeds(CONFIGS[name].width)
    asked, last, kept = held_by(network), held_by(network), held_by(network)
    wanted = hidden(network, x, asked)
    found = logits(network, x, last)
    append(network, x[:300], kept)
    assert torch.equal(logits(network, x[300:], kept, start=HELD[1] + 300), found)
    assert same(asked, last)
    assert same(asked, kept)
    head: Any = network.lm_head
    rows = head.out_features
    assert torch.equal(found, packed_linear(wanted[-1:], head.packed, kind=kind, rows=rows, level=level)[0])


@EACH
@pytest.mark.parametrize("name", ["llama", "tiny"])
def test_the_number_of_threads_changes_no_bit(name: str, kind: Kind, level: str) -> None:
    network, x = kernels(name, kind, level), embeds(CONFIGS[name].width, tokens=150)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(hidden(network, x, held_by(network)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("parts", [("gate_proj",), ("kv_b_proj",)], ids="+".join)
def test_what_one_call_does_not_serve(native: Library, parts: tuple[str, ...]) -> None:
    """A gate packed alone, and a latent's expansion that is packed."""
    network: Any = build(CONFIGS["small"])
    for name, module in list(network.named_modules()):
        if name.endswith(parts) and isinstance(module, torch.nn.Linear):
            network.set_submodule(name, quantize_module(module, "int8")[0])
    accelerate(network)
    keys, values = held_by(network).buffers
    x = embeds(CONFIGS["small"].width, tokens=12)
    assert not prompts_served(network)
    assert prompt_hidden(network, x, slot=1, start=5, keys=keys, values=values) is None
