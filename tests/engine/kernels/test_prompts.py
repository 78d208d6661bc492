"""Prompts in one call a piece, beside the network they compute: tiny, of odd widths, with random weights."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from seekvl.engine.cache import KVCache
from seekvl.engine.kernels import prompts
from seekvl.engine.kernels.accelerate import MOST_ROWS, accelerate
from seekvl.engine.kernels.compiled import LEVELS, Library
from seekvl.engine.kernels.products import linear
from seekvl.engine.kernels.prompts import append_prompt, prompt_hidden, prompt_logits, prompts_served
from seekvl.runtime import SeekVLError
from tests.engine.kernels.test_decoder import (
    ALL_CONFIGS,
    CONFIGS,
    GATES,
    HALVES,
    HEAD,
    PLAIN,
    UNSERVED,
    Network,
    build,
    fill,
    kernels,
)

HELD = (9, 5)
"""Tokens the rows hold before; the prompt goes to the second."""
TOKENS = 600
PIECES = (1, 7, 9, 255, 1, 256, 71)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _every_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every level serve, gain or not, but where that is what is tested."""
    if "native" not in request.fixturenames or "level" in request.fixturenames:
        monkeypatch.setattr(prompts, "_GAINING", frozenset(range(len(LEVELS))))


@cache
def embeds(width: int, dtype: torch.dtype = torch.float32, *, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(7)).to(dtype)


def held_by(network: Network, *, dtype: torch.dtype | None = None) -> KVCache:
    """Make a cache with room for the prompt."""
    held = fill(network, lengths=HELD, dtype=dtype)
    held.reserve(HELD[1] + TOKENS)
    return held


def hidden(network: Network, x: Tensor, held: KVCache, *, start: int = HELD[1]) -> Tensor:
    keys, values = held.buffers
    found = prompt_hidden(network, x, slot=1, start=start, keys=keys, values=values)
    assert found is not None
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    return found


def logits(network: Network, x: Tensor, held: KVCache, *, start: int = HELD[1]) -> Tensor:
    keys, values = held.buffers
    found = prompt_logits(network, x, slot=1, start=start, keys=keys, values=values)
    assert found is not None
    assert found.shape == (HEAD,)
    assert found.dtype == torch.float32
    return found


def append(network: Network, x: Tensor, held: KVCache, *, start: int = HELD[1]) -> None:
    keys, values = held.buffers
    assert append_prompt(network, x, slot=1, start=start, keys=keys, values=values)


def by_torch(network: Network, x: Tensor, held: KVCache) -> Tensor:
    """Do the same without the kernels."""
    accelerate(network, level="off")
    view = held.row(1)
    found: Tensor = network(x[None], positions=view.positions(len(x)), cache=view)[0]
    return found.float()


def same(one: KVCache, other: KVCache) -> bool:
    pairs = zip(one.buffers, other.buffers, strict=True)
    return all(torch.equal(a, b) for sides in pairs for a, b in zip(*sides, strict=True))


def exact_copy(network: Network) -> tuple[Network, KVCache]:
    """Return the network and its cache in float32, with the same numbers."""
    exact = held_by(network, dtype=torch.float32)
    for wide, half in zip(exact.buffers, held_by(network).buffers, strict=True):
        for to, buffer in zip(wide, half, strict=True):
            to.copy_(buffer)
    return copy.deepcopy(network).float(), exact


@ALL_CONFIGS
def test_float32_equals_the_network(name: str, level: str) -> None:
    """Hidden states are of size 1: what remains is the order of the sums. Nothing else is written to."""
    network, x = kernels(name, level), embeds(CONFIGS[name].width)
    ours, theirs = held_by(network), held_by(network)
    found = hidden(network, x, ours)
    assert (found - by_torch(network, x, theirs)).abs().max() < 1e-5
    untouched = held_by(network)
    for sides in zip(ours.buffers, theirs.buffers, untouched.buffers, strict=True):
        for new, wanted, old in zip(*sides, strict=True):
            columns = slice(HELD[1], HELD[1] + len(x))
            assert (new[1, :, columns] - wanted[1, :, columns]).abs().max() < 1e-5
            new[1, :, columns] = old[1, :, columns]
            assert torch.equal(new, old)


@HALVES
@ALL_CONFIGS
def test_half_precision_is_nearer_to_float32_than_torch(name: str, level: str, dtype: torch.dtype) -> None:
    """Experts of nearly equal scores may be chosen differently on any side, so it is the mean that counts."""
    network, x = kernels(name, level, dtype), embeds(CONFIGS[name].width, dtype, tokens=200)
    found = hidden(network, x, held_by(network))
    wide, exact = exact_copy(network)
    wanted = by_torch(wide, x.float(), exact)
    theirs = by_torch(network, x, held_by(network))
    error, limit = (found - wanted).abs().mean(), (theirs - wanted).abs().mean()
    assert error <= limit, (float(error), float(limit))


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama, shared heads", "small"])
def test_the_cache_may_be_of_another_dtype(name: str, level: str, held: torch.dtype) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        network, x = kernels(name, level, dtype), embeds(CONFIGS[name].width, tokens=40)
        found = hidden(network, x, held_by(network, dtype=held))  # embeddings of another dtype, too
        wide, exact = exact_copy(network)
        wanted = by_torch(wide, x, exact)
        assert (found - wanted).abs().mean() < (1e-5 if {dtype, held} == {torch.float32} else 0.01)


@BOTH
@ALL_CONFIGS
def test_pieces_change_no_bit(name: str, level: str, dtype: torch.dtype) -> None:
    network, x = kernels(name, level, dtype), embeds(CONFIGS[name].width, dtype)
    whole, cut = held_by(network), held_by(network)
    wanted, start, parts = hidden(network, x, whole), HELD[1], []
    for part in torch.split(x, PIECES):
        parts.append(hidden(network, part, cut, start=start))
        start += len(part)
    assert torch.equal(torch.cat(parts), wanted)
    assert same(whole, cut)


@pytest.mark.parametrize("name", ["llama, shared heads", "tiny", "small"])
def test_what_is_not_asked_for_changes_no_bit(name: str, level: str) -> None:
    """Of the last layer only what the cache keeps is computed for tokens that nobody asks about."""
    network, x = kernels(name, level, torch.bfloat16), embeds(CONFIGS[name].width, torch.bfloat16)
    asked, last, kept = held_by(network), held_by(network), held_by(network)
    wanted = hidden(network, x, asked)
    found = logits(network, x, last)
    append(network, x[:300], kept)
    assert torch.equal(logits(network, x[300:], kept, start=HELD[1] + 300), found)
    assert same(asked, last)
    assert same(asked, kept)
    of_hidden = linear(wanted[-1:], network.lm_head.weight, level=level)[0]
    assert (found - of_hidden).abs().max() < 0.02


@BOTH
@pytest.mark.parametrize("name", ["llama", "tiny", "small"])
def test_the_number_of_threads_changes_no_bit(name: str, level: str, dtype: torch.dtype) -> None:
    network, x = kernels(name, level, dtype), embeds(CONFIGS[name].width, dtype, tokens=150)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(hidden(network, x, held_by(network)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("gate", GATES)
def test_every_router_decides_as_the_gate(gate: str, level: str) -> None:
    network, x = build(replace(PLAIN, moe=GATES[gate], layers=2)), embeds(PLAIN.width, tokens=60)
    accelerate(network, level=level)
    found = hidden(network, x, held_by(network))
    assert (found - by_torch(network, x, held_by(network))).abs().max() < 1e-5


def test_peaks_of_attention_far_apart(level: str) -> None:
    """Scores of hundreds: one key takes all, in whatever block it is."""
    x = embeds(CONFIGS["llama"].width)
    for column in (3, 140, 500):
        network = kernels("llama", level)
        steep = x.clone()
        steep[column] *= 300.0
        for layer in network.layers:
            layer.attn_norm.eps = 1e4  # type: ignore[union-attr, assignment]  # so that size reaches the scores
        try:
            found = hidden(network, steep, held_by(network))
            assert (found - by_torch(network, steep, held_by(network))).abs().max() < 1e-4
        finally:
            for layer in network.layers:
                layer.attn_norm.eps = CONFIGS["llama"].norm_eps  # type: ignore[union-attr, assignment]


def test_levels_that_are_slower_than_torch_leave_prompts_to_it(native: Library) -> None:
    network = build(CONFIGS["llama"])
    for name in native.levels:
        accelerate(network, level=name)
        keys, values = held_by(network).buffers
        found = prompt_hidden(network, embeds(54), slot=1, start=5, keys=keys, values=values)
        assert prompts_served(network) == (found is not None) == (name in MOST_ROWS)


@pytest.mark.parametrize("change", UNSERVED)
def test_what_one_call_does_not_serve(native: Library, change: Callable[[Network], None]) -> None:
    network, x = build(CONFIGS["llama"]), embeds(54, tokens=12)
    held = held_by(network)
    accelerate(network)
    hidden(network, x, held)
    untouched = copy.deepcopy(held)
    change(network)
    keys, values = held.buffers
    assert not prompts_served(network)
    assert prompt_hidden(network, x, slot=1, start=5, keys=keys, values=values) is None
    assert prompt_logits(network, x, slot=1, start=5, keys=keys, values=values) is None
    assert not append_prompt(network, x, slot=1, start=5, keys=keys, values=values)
    assert same(untouched, held)


def test_moments_caches_and_embeddings_one_call_does_not_serve(native: Library) -> None:
    network, x = build(CONFIGS["llama"]), embeds(54, tokens=12)
    accelerate(network)
    keys, values = held_by(network).buffers

    def attempt(x: Tensor, keys: list[Tensor]) -> bool:
        return append_prompt(network, x, slot=1, start=5, keys=keys, values=values)

    assert attempt(x, keys)
    with torch.enable_grad():
        assert not attempt(x, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not attempt(x, keys)
    assert not attempt(x.double(), keys)
    assert not attempt(x.to("meta"), keys)
    assert not attempt(x, [k.double() for k in keys])
    assert not attempt(x, [k.transpose(1, 2).contiguous().transpose(1, 2) for k in keys])


def test_embeddings_need_not_be_contiguous(level: str) -> None:
    network, x = kernels("llama", level), embeds(54, tokens=40)
    wanted = hidden(network, x, held_by(network))
    assert torch.equal(hidden(network, x.T.contiguous().T, held_by(network)), wanted)


def test_what_does_not_fit_is_refused(native: Library) -> None:
    network, x = build(CONFIGS["llama"]), embeds(54, tokens=12)
    accelerate(network)
    keys, values = held_by(network).buffers
    capacity = keys[0].shape[2]

    def attempt(x: Tensor, slot: int, start: int) -> object:
        return append_prompt(network, x, slot=slot, start=start, keys=keys, values=values)

    with pytest.raises(SeekVLError, match=r"embeddings \[12, 53\] do not fit \[n, 54\]"):
        attempt(x[:, :-1], 1, 5)
    for wrong in (x[None], x[0], x[:0]):
        with pytest.raises(SeekVLError, match=r"embeddings .* with at least 1 token"):
            attempt(wrong, 1, 5)
    for slot, start in ((2, 0), (-1, 0), (0, -1), (0, capacity - 11)):
        with pytest.raises(SeekVLError, match=rf"row {slot}, columns {start} to {start + 12} do not exist"):
            attempt(x, slot, start)
    with pytest.raises(SeekVLError, match="a cache of 1 and 2 layers for a network of 2"):
        append_prompt(network, x, slot=1, start=5, keys=keys[:1], values=values)
    other = held_by(build(CONFIGS["llama, shared heads"])).buffers
    with pytest.raises(SeekVLError, match="a buffer of the cache is"):
        append_prompt(network, x, slot=1, start=5, keys=other[0], values=other[1])
