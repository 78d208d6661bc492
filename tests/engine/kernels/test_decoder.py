"""The step beside the network it computes: tiny, of odd widths, with random weights."""

import copy
import gc
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seekvl.engine.cache import KVCache
from seekvl.engine.kernels import decoder
from seekvl.engine.kernels.accelerate import KernelLinear, accelerate
from seekvl.engine.kernels.compiled import LEVELS, Library
from seekvl.engine.kernels.decoder import decode
from seekvl.models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from seekvl.models.llama import Llama, LlamaConfig
from seekvl.models.mla import MlaConfig
from seekvl.models.moe import Gate, MoeConfig
from seekvl.runtime import SeekVLError

Network = Llama | DeepseekV2

LENGTHS = (0, 1, 127, 128, 254, 255, 256, 699)
"""Tokens the rows hold before the step: around the blocks of the attention, and several of them."""
VOCAB, HEAD = 61, 67
MOE = MoeConfig(experts=7, active=3, shared=2, width=19, scoring="softmax", choice="greedy")
MLA = MlaConfig(kv_rank=21, nope_width=7, rope_width=6, value_width=5)
PLAIN = DeepseekV2Config(
    vocab_size=VOCAB,
    width=36,
    layers=3,
    heads=2,
    kv_heads=2,
    mlp_width=41,
    mla=None,
    moe=MOE,
    dense_first=1,
)
CONFIGS: dict[str, LlamaConfig | DeepseekV2Config] = {
    "llama": LlamaConfig(vocab_size=VOCAB, width=54, layers=2, heads=3, kv_heads=3, mlp_width=37),
    "llama, shared heads": LlamaConfig(
        vocab_size=VOCAB, width=84, layers=2, heads=6, kv_heads=2, mlp_width=33, rope_theta=500.0
    ),
    "llama, one key for ten": LlamaConfig(
        vocab_size=VOCAB, width=60, layers=1, heads=10, kv_heads=1, mlp_width=35, norm_eps=0.1
    ),
    "tiny": PLAIN,
    "small": replace(PLAIN, heads=3, kv_heads=3, mla=MLA),
    "small, ten heads": replace(PLAIN, width=35, heads=10, kv_heads=10, mla=MLA, layers=1, moe=None),
    "without shared experts": replace(PLAIN, moe=replace(MOE, shared=0), dense_first=0),
}
GATES = {
    "normalised": replace(MOE, normalise=True, scale=2.5),
    "sigmoid": replace(MOE, scoring="sigmoid", normalise=True),
    "one": replace(MOE, active=1, normalise=True),
    "all": replace(MOE, active=7),
    "groups": replace(MOE, experts=12, groups=4, kept_groups=2, choice="group_limited"),
    "one group": replace(MOE, choice="group_limited"),
    "biased": replace(MOE, scoring="sigmoid", choice="noaux_tc", normalise=True, scale=1.5),
    "biased groups": replace(
        MOE, experts=12, groups=3, kept_groups=2, scoring="sigmoid", choice="noaux_tc", scale=0.7
    ),
}
ALL_CONFIGS = pytest.mark.parametrize("name", CONFIGS)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(config: LlamaConfig | DeepseekV2Config, *, dtype: torch.dtype = torch.float32) -> Network:
    """Make a network; its head has other rows than its embedding, as after adding tokens."""
    torch.manual_seed(0)
    network: Network = Llama(config) if isinstance(config, LlamaConfig) else DeepseekV2(config)
    network.lm_head = nn.Linear(config.width, HEAD, bias=False)
    for name, parameter in network.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    for module in network.modules():
        if isinstance(module, Gate) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
    return network.requires_grad_(False).to(dtype)


@cache
def _network(name: str, dtype: torch.dtype) -> Network:
    return build(CONFIGS[name], dtype=dtype)


def kernels(name: str, level: str, dtype: torch.dtype = torch.float32) -> Network:
    network = _network(name, dtype)
    accelerate(network, level=level)
    return network


def fill(
    network: Network, *, lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype | None = None
) -> KVCache:
    """Make a cache whose rows hold so many tokens; a row holds the same whatever stands beside it."""
    dtype = network.norm.weight.dtype if dtype is None else dtype
    held = KVCache(network.config, rows=len(lengths), device=torch.device("cpu"), dtype=dtype)
    held.reserve(max(lengths) + 1)
    for side, buffers in enumerate(held.buffers):
        for layer, buffer in enumerate(buffers):
            for row, length in enumerate(lengths):
                seed = torch.Generator().manual_seed(1000 * length + 10 * layer + side)
                heads, width = buffer.shape[1], buffer.shape[3]
                buffer[row, :, :length] = torch.randn(length, heads, width, generator=seed).transpose(0, 1)
    held.lengths = list(lengths)
    return held


def ids(lengths: tuple[int, ...]) -> list[int]:
    """Give each row a token of its own."""
    return [length % VOCAB for length in lengths]


def run(network: Network, held: KVCache, *, rows: list[int] | None = None) -> Tensor:
    """Decode one token in each of some rows."""
    rows = list(range(len(held.lengths))) if rows is None else rows
    keys, values = held.buffers
    positions = [held.lengths[row] for row in rows]
    logits = decode(network, ids(tuple(positions)), slots=rows, positions=positions, keys=keys, values=values)
    assert logits is not None
    assert logits.shape == (len(rows), HEAD)
    assert logits.dtype == torch.float32
    return logits


def by_torch(network: Network, held: KVCache) -> Tensor:
    """Do the same without the kernels."""
    accelerate(network, level="off")
    n = len(held.lengths)
    tokens = torch.tensor(ids(tuple(held.lengths))).unsqueeze(1)
    at = held.at(range(n))
    hidden = network(network.embed_tokens(tokens), positions=at.positions(), mask=at.mask(), cache=at)
    logits: Tensor = network.lm_head(hidden[:, 0]).float()
    return logits


def appended(held: KVCache) -> Tensor:
    """Return what stands in the columns behind the rows, of all layers."""
    columns = [
        buffer[row, :, length].float().flatten()
        for buffers in held.buffers
        for buffer in buffers
        for row, length in enumerate(held.lengths)
    ]
    return torch.cat(columns)


@ALL_CONFIGS
def test_float32_equals_the_network(name: str, level: str) -> None:
    """Logits are of size 1, contexts up to 700: what remains is the order of the sums."""
    network = kernels(name, level)
    ours, theirs = fill(network), fill(network)
    before = [buffer.clone() for buffers in ours.buffers for buffer in buffers]
    found, wanted = run(network, ours), by_torch(network, theirs)
    assert (found - wanted).abs().max() < 5e-6
    assert (appended(ours) - appended(theirs)).abs().max() < 5e-6
    after = [buffer for buffers in ours.buffers for buffer in buffers]
    for old, new in zip(before, after, strict=True):
        changed = (old != new).any(dim=3).any(dim=1)  # rows capacity
        assert changed.sum() <= len(LENGTHS)
        for row, length in enumerate(LENGTHS):
            changed[row, length] = False
        assert not changed.any()


@HALVES
@ALL_CONFIGS
def test_half_precision_is_nearer_to_float32_than_torch(name: str, level: str, dtype: torch.dtype) -> None:
    """The same numbers computed in float32 are the truth. Experts of nearly equal scores may be chosen
    differently on any side, so it is the mean that counts.
    """
    network = kernels(name, level, dtype)
    exact = fill(network, dtype=torch.float32)
    for wide, half in zip(exact.buffers, fill(network).buffers, strict=True):
        for to, buffer in zip(wide, half, strict=True):
            to.copy_(buffer)
    found = run(network, fill(network))
    wanted = by_torch(copy.deepcopy(network).float(), exact)
    theirs = by_torch(network, fill(network))
    error, limit = (found - wanted).abs().mean(), (theirs - wanted).abs().mean()
    assert error <= limit, (float(error), float(limit))


@ALL_CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_batch_equals_the_row_alone_bit_for_bit(name: str, level: str, dtype: torch.dtype) -> None:
    network = kernels(name, level, dtype)
    together = run(network, fill(network))
    for n in range(1, len(LENGTHS)):
        assert torch.equal(run(network, fill(network, lengths=LENGTHS[:n])), together[:n])
    for row, length in enumerate(LENGTHS):
        alone = fill(network, lengths=(length,))
        assert torch.equal(run(network, alone), together[row : row + 1])


@ALL_CONFIGS
def test_the_number_of_threads_changes_no_bit(name: str, level: str) -> None:
    network, before = kernels(name, level, torch.bfloat16), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(network, fill(network)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ["llama", "small"])
def test_rows_may_stand_anywhere_in_the_cache(name: str, level: str) -> None:
    network = kernels(name, level)
    wanted, held = run(network, fill(network)), fill(network)
    assert torch.equal(run(network, held, rows=[6, 1, 3]), wanted[[6, 1, 3]])


@pytest.mark.parametrize("name", ["llama, shared heads", "small"])
def test_more_tokens_than_the_kernels_take_go_in_groups(name: str, level: str) -> None:
    network, lengths = kernels(name, level), LENGTHS + LENGTHS[:3]
    together = run(network, fill(network, lengths=lengths))
    assert torch.equal(together[8:], together[:3])


@pytest.mark.parametrize("name", ["llama", "tiny", "small"])
def test_tokens_of_one_row_at_once_equal_one_by_one(name: str, level: str) -> None:
    network = kernels(name, level)
    one, all_at_once = fill(network, lengths=(126, 5)), fill(network, lengths=(126, 5))
    tokens = [7, 8, 9, 10, 11]
    steps = []
    for token in tokens:
        keys, values = one.buffers
        steps.append(decode(network, [token], slots=[0], positions=one.lengths[:1], keys=keys, values=values))
        one.lengths[0] += 1
    keys, values = all_at_once.buffers
    found = decode(
        network,
        [*tokens, 5],
        slots=[0] * 5 + [1],
        positions=[126, 127, 128, 129, 130, 5],
        keys=keys,
        values=values,
    )
    assert found is not None
    assert torch.equal(found[:5], torch.cat([step for step in steps if step is not None]))
    assert torch.equal(keys[0][0], one.buffers[0][0][0])


@pytest.mark.parametrize("gate", GATES)
def test_every_router_decides_as_the_gate(gate: str, level: str) -> None:
    network = build(replace(PLAIN, moe=GATES[gate], layers=2))
    accelerate(network, level=level)
    found, wanted = run(network, fill(network)), by_torch(network, fill(network))
    assert (found - wanted).abs().max() < 5e-6


def gate_of(network: Network) -> Gate:
    return next(module for module in network.modules() if isinstance(module, Gate))


def test_of_experts_with_equal_scores_the_first_are_chosen(native: Library) -> None:
    """The bias of `noaux_tc` counts for the choice only: one that falls must change nothing."""
    network = build(replace(PLAIN, moe=GATES["biased"], layers=2))
    accelerate(network, level="portable")
    gate = gate_of(network)
    assert gate.bias is not None
    gate.weight.zero_()
    gate.bias.zero_()
    tied = run(network, fill(network))
    gate.bias.copy_(torch.linspace(0.1, 0, 7))
    assert torch.equal(run(network, fill(network)), tied)
    gate.bias.copy_(torch.linspace(0, 0.1, 7))
    assert not torch.equal(run(network, fill(network)), tied)


@pytest.mark.parametrize("gate", ["sigmoid", "groups", "biased groups"])
def test_nan_reaches_the_logits_and_nothing_else(gate: str, level: str) -> None:
    network = build(replace(PLAIN, moe=GATES[gate], layers=2))
    accelerate(network, level=level)
    gate_of(network).weight.fill_(torch.nan)
    assert run(network, fill(network)).isnan().all()
    for rows in fill(network).buffers:
        rows[0][0] = torch.nan
    held = fill(network)
    held.buffers[1][0][1, :, 0] = torch.nan
    gate_of(network).weight.zero_()
    assert run(network, held).isnan().any(dim=1).tolist() == [row == 1 for row in range(8)]


def test_peaks_of_attention_far_apart(level: str) -> None:
    """Scores of hundreds: one key takes all, in whatever block it is."""
    network = kernels("llama", level)
    for column in (3, 140, 600):
        ours, theirs = fill(network), fill(network)
        for held in (ours, theirs):
            for keys in held.buffers[0]:
                keys[:, :, column] *= 300.0
        assert (run(network, ours) - by_torch(network, theirs)).abs().max() < 2e-5
        accelerate(network, level=level)


def test_two_python_threads_at_once(level: str) -> None:
    networks = [kernels(name, level) for name in ("llama", "small", "tiny")]
    wanted = [run(network, fill(network)) for network in networks]

    def again(turn: int) -> bool:
        with torch.no_grad():
            which = turn % len(networks)
            return torch.equal(run(networks[which], fill(networks[which])), wanted[which])

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(again, range(12)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_decodes_too(native: Library) -> None:
    network = kernels("small", native.levels[-1])
    wanted, held = run(network, fill(network)), fill(network)
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # a child that hangs must not outlive the test
        os._exit(0 if torch.equal(run(network, held), wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# When the network changes


def replace_layer(network: Any) -> None:
    old = network.layers[0].mlp.up_proj
    layer = KernelLinear(old.in_features, old.out_features, bias=False)
    layer.level, layer.smallest = network.lm_head.level, None
    network.layers[0].mlp.up_proj = layer.requires_grad_(False)


def replace_weight(network: Any) -> None:
    norm = network.layers[1].mlp_norm
    norm.weight = nn.Parameter(torch.rand(network.config.width), requires_grad=False)


def replace_memory(network: Any) -> None:
    network.layers[0].mlp.gate_proj.weight.data = torch.randn(network.layers[0].mlp.gate_proj.weight.shape)


def load_others(network: Any) -> None:
    network.load_state_dict({name: x * 0.9 for name, x in network.state_dict().items()})


def change_in_place(network: Any) -> None:
    network.lm_head.weight.mul_(2)


@pytest.mark.parametrize(
    "change", [replace_layer, replace_weight, replace_memory, load_others, change_in_place]
)
def test_a_change_of_weights_is_noticed(native: Library, change: Callable[[Network], None]) -> None:
    network = build(CONFIGS["small"])
    accelerate(network)
    before = run(network, fill(network))
    change(network)
    found = run(network, fill(network))
    assert not torch.allclose(found, before, atol=1e-3)
    assert (found - by_torch(network, fill(network))).abs().max() < 1e-4


def test_weights_may_change_their_dtype(native: Library) -> None:
    network = build(CONFIGS["tiny"])
    accelerate(network)
    full = run(network, fill(network))
    half = run(network.to(torch.bfloat16), fill(network))
    assert not torch.equal(half, full)
    network.to(torch.float32)  # of rounded weights
    again = run(network, fill(network))
    assert (again - by_torch(network, fill(network))).abs().max() < 5e-6
    assert not torch.equal(again, full)
    accelerate(network.to(torch.float16))
    assert 0 < (run(network, fill(network)) - again).abs().max() < 0.05


def test_a_network_that_is_gone_is_forgotten(native: Library) -> None:
    network = build(CONFIGS["llama"])
    accelerate(network)
    run(network, fill(network))
    assert network in decoder._KNOWN
    known = len(decoder._KNOWN)
    del network
    gc.collect()
    assert len(decoder._KNOWN) < known


def test_weights_that_were_replaced_are_not_kept(native: Library) -> None:
    network: Any = build(CONFIGS["llama"])
    accelerate(network)
    run(network, fill(network))
    layer, weight = (weakref.ref(x) for x in (network.layers[1].mlp, network.layers[0].attn_norm.weight))
    network.layers[1].mlp = nn.Identity()
    network.layers[0].attn_norm.weight = nn.Parameter(torch.ones(network.config.width))
    gc.collect()
    assert layer() is None
    assert weight() is None


def adapt(network: Any) -> None:
    class Adapted(KernelLinear):
        """Somebody's own."""

    network.layers[0].attn.q_proj.__class__ = Adapted


def wrap(network: Any) -> None:
    network.layers[1].mlp_norm = nn.Sequential(network.layers[1].mlp_norm)


def listen(network: Any) -> None:
    network.layers[0].register_forward_hook(lambda *_: None)


def listen_before(network: Any) -> None:
    network.norm.register_forward_pre_hook(lambda *_: None)


def replace_forward(network: Any) -> None:
    layer = network.layers[0]
    layer.forward = layer.forward


def transpose_weight(network: Any) -> None:
    weight = network.layers[0].attn.o_proj.weight
    weight.data = weight.data.T.contiguous().T


def transpose_in_place(network: Any) -> None:
    weight = network.layers[0].attn.o_proj.weight
    weight.data = weight.data.T


def add_bias(network: Any) -> None:
    layer = network.layers[0].attn.o_proj
    layer.bias = nn.Parameter(torch.ones(network.config.width))


def mix_dtypes(network: Any) -> None:
    network.norm.to(torch.bfloat16)


def widen_all(network: Any) -> None:
    network.to(torch.float64)


def leave(network: Any) -> None:
    network.to("meta")


def plain_classes(network: Any) -> None:
    accelerate(network, level="off")


def other_level(network: Any) -> None:
    layer = network.layers[0].attn.q_proj
    layer.level = LEVELS.index("neon")


def shorten(network: Any) -> None:
    norm = network.layers[0].attn_norm
    norm.weight = nn.Parameter(torch.ones(2))


UNSERVED = (
    *(adapt, wrap, listen, listen_before, replace_forward, transpose_weight, transpose_in_place, add_bias),
    *(mix_dtypes, widen_all, leave, plain_classes, other_level, shorten),
)


@pytest.mark.parametrize("change", UNSERVED)
@pytest.mark.parametrize("when", ["before the first step", "after it"])
def test_what_one_step_does_not_serve(native: Library, change: Callable[[Network], None], when: str) -> None:
    network = build(CONFIGS["llama"])
    held = fill(network, lengths=(3,))
    accelerate(network)
    if when == "after it":
        run(network, held)
    untouched = [buffer.clone() for buffers in held.buffers for buffer in buffers]
    change(network)
    keys, values = held.buffers
    assert decode(network, [1], slots=[0], positions=[3], keys=keys, values=values) is None
    assert all(torch.equal(a, b) for a, b in zip(untouched, (*keys, *values), strict=True))


def test_moments_and_caches_one_step_does_not_serve(native: Library) -> None:
    network = build(CONFIGS["llama"])
    accelerate(network)
    keys, values = fill(network, lengths=(3,)).buffers

    def attempt(keys: list[Tensor], values: list[Tensor]) -> Tensor | None:
        return decode(network, [1], slots=[0], positions=[3], keys=keys, values=values)

    assert attempt(keys, values) is not None
    with torch.enable_grad():
        assert attempt(keys, values) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attempt(keys, values) is None
    assert attempt([k.double() for k in keys], [v.double() for v in values]) is None
    assert attempt(keys, [v.bfloat16() for v in values]) is None
    assert attempt([k.to("meta") for k in keys], values) is None
    strided = [k.transpose(1, 2).contiguous().transpose(1, 2) for k in keys]
    assert attempt(strided, values) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cache_may_be_of_another_dtype(dtype: torch.dtype, level: str) -> None:
    network = kernels("small", level)
    full, half = run(network, fill(network)), run(network, fill(network, dtype=dtype))
    assert 0 < (full - half).abs().max() < 0.05


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tokens": [VOCAB]}, r"token 61 is none of the 61 of the embedding"),
    ({"tokens": [-1]}, "token -1 is none"),
    ({"slots": [2]}, "row 2, column 3 does not exist in a cache of 2 rows of 256"),
    ({"slots": [-1]}, "row -1"),
    ({"positions": [256]}, "row 0, column 256"),
    ({"positions": [-1]}, "column -1"),
    ({"tokens": []}, "0 tokens, 1 rows and 1 columns"),
    ({"tokens": [], "slots": [], "positions": []}, "at least 1"),
    ({"tokens": [1, 2], "slots": [0, 0], "positions": [3, 3]}, "row 0: a token for column 3 after one for"),
    ({"tokens": [1, 2], "slots": [0, 0], "positions": [4, 3]}, "row 0: a token for column 3 after .* 4"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_named(native: Library, change: dict[str, Any], message: str) -> None:
    network = build(CONFIGS["llama"])
    accelerate(network)
    keys, values = fill(network, lengths=(3, 3)).buffers
    good: dict[str, Any] = {"tokens": [1], "slots": [0], "positions": [3], "keys": keys, "values": values}
    assert decode(network, **good) is not None
    with pytest.raises(SeekVLError, match=message):
        decode(network, **good | change)


def test_a_cache_of_another_network_is_named(native: Library) -> None:
    network, other = build(CONFIGS["llama"]), build(CONFIGS["llama, shared heads"])
    accelerate(network)
    keys, values = fill(other, lengths=(3,)).buffers
    with pytest.raises(
        SeekVLError, match=r"buffer of the cache is \[1, 2, 256, 14\].* needs \[1, 3, 256, 18\]"
    ):
        decode(network, [1], slots=[0], positions=[3], keys=keys, values=values)
    keys, values = fill(network, lengths=(3,)).buffers
    with pytest.raises(SeekVLError, match="a cache of 1 and 2 layers for a network of 2"):
        decode(network, [1], slots=[0], positions=[3], keys=keys[:1], values=values)
