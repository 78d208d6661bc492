"""The step with packed weights, beside the same layers one by one: tiny, of odd widths."""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seekvl.engine.kernels.accelerate import KernelQuantizedLinear, accelerate
from seekvl.engine.kernels.compiled import Library
from seekvl.engine.kernels.decoder import decode
from seekvl.engine.kernels.network import describe
from seekvl.models.moe import Experts
from seekvl.models.quantized import KINDS, Kind
from seekvl.weights.quantize import STAYS, quantize_module
from tests.engine.kernels.test_decoder import CONFIGS, LENGTHS, Network, appended, build, by_torch, fill, run

EACH = pytest.mark.parametrize("kind", KINDS)
NAMES = ("llama", "llama, shared heads", "tiny", "small", "without shared experts")
ALL_NAMES = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def quantize(network: Network, kind: Kind, *, only: str = "") -> Network:
    """Quantise all that a language model may have quantised, or those modules whose name holds `only`."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear | Experts) and name.rpartition(".")[2] not in STAYS and only in name:
            network.set_submodule(name, quantize_module(module, kind)[0])
    return network


@cache
def _network(name: str, kind: Kind, dtype: torch.dtype) -> Network:
    return quantize(build(CONFIGS[name], dtype=dtype), kind)


def kernels(name: str, kind: Kind, level: str, dtype: torch.dtype = torch.float32) -> Network:
    network = _network(name, kind, dtype)
    accelerate(network, level=level)
    return network


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether rows differ by the order of sums, but for a few where an input on the border between two whole
    numbers fell the other way, which is a hundredth of that input.
    """
    rows = (found - wanted).abs().amax(dim=1)
    return bool(rows.median() < 5e-6 and rows.max() < 0.05)


@EACH
@ALL_NAMES
def test_a_step_equals_the_layers_one_by_one(name: str, kind: Kind, level: str) -> None:
    network = kernels(name, kind, level)
    ours, theirs = fill(network), fill(network)
    found, wanted = run(network, ours), by_torch(network, theirs)
    assert same(found, wanted), (found - wanted).abs().amax(dim=1)
    assert (appended(ours) - appended(theirs)).abs().median() < 5e-6


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_packed_may_be_of_half_precision(kind: Kind, level: str, dtype: torch.dtype) -> None:
    """Logits of the same weights in float32 are nearer to the step's than to those that torch rounds."""
    network = kernels("small", kind, level, dtype)
    found, theirs = run(network, fill(network)), by_torch(network, fill(network))
    wide = copy.deepcopy(network).float()
    exact = fill(wide)
    for to, half in zip(exact.buffers, fill(network).buffers, strict=True):
        for wider, buffer in zip(to, half, strict=True):
            wider.copy_(buffer)
    wanted = by_torch(wide, exact)
    assert (found - wanted).abs().mean() <= (theirs - wanted).abs().mean()
    assert (found - wanted).abs().median() < 0.01


@EACH
@ALL_NAMES
def test_a_row_of_a_batch_equals_the_row_alone_bit_for_bit(name: str, kind: Kind, level: str) -> None:
    network = kernels(name, kind, level)
    together = run(network, fill(network))
    for n in range(1, len(LENGTHS)):
        assert torch.equal(run(network, fill(network, lengths=LENGTHS[:n])), together[:n])
    for row, length in enumerate(LENGTHS):
        assert torch.equal(run(network, fill(network, lengths=(length,))), together[row : row + 1])


@EACH
@pytest.mark.parametrize("name", ["llama", "small"])
def test_the_number_of_threads_changes_no_bit(name: str, kind: Kind, level: str) -> None:
    network, before = kernels(name, kind, level), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(network, fill(network)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("only", ["q_proj", "o_proj", "mlp", "lm_head", "layers.1", "experts"])
def test_any_part_may_be_packed_beside_plain_ones(native: Library, only: str) -> None:
    network = quantize(build(CONFIGS["small"]), "int4", only=only)
    accelerate(network)
    assert same(run(network, fill(network)), by_torch(network, fill(network)))


def test_both_kinds_in_one_layer(native: Library) -> None:
    """One input is rounded in two ways then, and given as it is to a third matrix."""
    network: Any = quantize(quantize(build(CONFIGS["llama"]), "int8", only="q_proj"), "int4", only="k_proj")
    accelerate(network)
    assert same(run(network, fill(network)), by_torch(network, fill(network)))


def test_nan_reaches_the_logits_of_its_row_alone(native: Library) -> None:
    network = quantize(build(CONFIGS["llama"]), "int8")
    accelerate(network)
    held = fill(network)
    held.buffers[1][0][1, :, 0] = torch.nan
    assert run(network, held).isnan().all(dim=1).tolist() == [row == 1 for row in range(len(LENGTHS))]


def other_memory(network: Any) -> None:
    layer = network.layers[0].mlp.up_proj
    layer.packed = layer.packed.flip(0).clone()


def other_module(network: Any) -> None:
    plain = nn.Linear(network.config.width, network.config.width, bias=False).requires_grad_(False)
    network.layers[1].attn.q_proj = quantize_module(plain, "int8")[0]
    accelerate(network)


def change_in_place(network: Any) -> None:
    network.lm_head.packed[:, :64].view(torch.float32).mul_(2)


@pytest.mark.parametrize("change", [other_memory, other_module, change_in_place])
def test_a_change_of_packed_weights_is_noticed(native: Library, change: Callable[[Network], None]) -> None:
    network = quantize(build(CONFIGS["llama"]), "int8")
    accelerate(network)
    before = run(network, fill(network))
    change(network)
    found = run(network, fill(network))
    assert not torch.allclose(found, before, atol=1e-3)
    assert same(found, by_torch(network, fill(network)))


def pack_the_expansion(network: Any) -> None:
    attn = network.layers[0].attn
    attn.kv_b_proj = quantize_module(attn.kv_b_proj, "int8")[0]
    accelerate(network)


def pack_a_gate_alone(network: Any) -> None:
    mlp = network.layers[0].mlp
    mlp.gate_proj = quantize_module(build(CONFIGS["small"]).layers[0].mlp.gate_proj, "int4")[0]
    accelerate(network)


def shorten(network: Any) -> None:
    layer = network.layers[0].attn.o_proj
    layer.packed = layer.packed[:1].clone()


def claim_other_rows(network: Any) -> None:
    network.layers[0].attn.o_proj.out_features -= 1


def stride(network: Any) -> None:
    layer = network.layers[0].attn.o_proj
    layer.packed = layer.packed.repeat(1, 2)[:, ::2]


def other_numbers(network: Any) -> None:
    layer = network.layers[0].attn.o_proj
    layer.packed = layer.packed.to(torch.int8)


def leave(network: Any) -> None:
    network.layers[0].attn.o_proj.to("meta")


def listen(network: Any) -> None:
    network.layers[0].attn.o_proj.register_forward_hook(lambda *_: None)


def adapt(network: Any) -> None:
    class Adapted(KernelQuantizedLinear):
        """Somebody's own."""

    network.layers[0].attn.o_proj.__class__ = Adapted


def mix_dtypes(network: Any) -> None:
    network.norm.to(torch.bfloat16)


UNSERVED = (
    *(pack_the_expansion, pack_a_gate_alone, shorten, stride, other_numbers),
    *(leave, listen, adapt, mix_dtypes),
)


@pytest.mark.parametrize("change", [claim_other_rows, *UNSERVED])
def test_what_one_step_does_not_serve(native: Library, change: Callable[[Network], None]) -> None:
    network = quantize(build(CONFIGS["small"]), "int8")
    accelerate(network)
    change(network)
    assert describe(network) is None


@pytest.mark.parametrize("change", UNSERVED)
def test_what_it_serves_no_longer(native: Library, change: Callable[[Network], None]) -> None:
    network = quantize(build(CONFIGS["small"]), "int8")
    accelerate(network)
    keys, values = fill(network, lengths=(3,)).buffers
    at: dict[str, Any] = {"slots": [0], "positions": [3], "keys": keys, "values": values}
    assert decode(network, [1], **at) is not None
    change(network)
    assert decode(network, [1], **at) is None
