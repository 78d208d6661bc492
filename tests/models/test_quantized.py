import pytest
import torch
from torch import Tensor, nn

from seekvl.models.moe import Experts, MoeConfig
from seekvl.models.quantized import (
    GROUP,
    INPUT_GROUP,
    KINDS,
    RANGE,
    Kind,
    QuantizedExperts,
    QuantizedLinear,
    pack,
    packed_shape,
    quantized_like,
    quantized_modules,
    rounded_inputs,
    scales_of,
    unpack,
)
from seekvl.runtime import SeekVLError

EACH = pytest.mark.parametrize("kind", KINDS)
SHAPES = ((1, 1), (3, 7), (16, 64), (17, 65), (33, 130), (40, 96))
"""Rows and inputs around those of tiles and units."""


def numbers(kind: Kind, o: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales, and the matrix they stand for."""
    generator = torch.Generator().manual_seed(o * 1000 + i)
    low, high = RANGE[kind]
    values = torch.randint(low, high + 1, (o, i), generator=generator)
    if kind == "int8":
        scales = torch.rand(o, generator=generator)
        return values, scales, values * scales[:, None]
    scales = torch.randn(o, -(-i // GROUP), generator=generator).bfloat16().float()
    return values, scales, values * scales.repeat_interleave(GROUP, dim=1)[:, :i]


@EACH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_packed_comes_back(kind: Kind, shape: tuple[int, int]) -> None:
    o, i = shape
    values, scales, matrix = numbers(kind, o, i)
    packed = pack(values, scales, kind=kind)
    assert packed.dtype == torch.uint8
    assert packed.shape == packed_shape(kind, o, i)
    assert torch.equal(unpack(packed, kind=kind, rows=o, width=i), matrix)
    found = set(scales_of(packed, kind=kind).float().flatten().tolist())
    assert set(scales.flatten().tolist()) <= found <= set(scales.flatten().tolist()) | {0.0}


def test_bytes_lie_as_the_documentation_says() -> None:
    """Row 3 alone has numbers, at inputs 5 and 70: line 1 of 4 inputs, and line 17."""
    values = torch.zeros(16, 128, dtype=torch.int64)
    values[3, 5], values[3, 70] = 100, -7
    packed = pack(values, torch.arange(1.0, 17.0), kind="int8")
    assert packed.shape == (1, 64 + 16 * 128)
    assert packed[0, :64].view(torch.float32).tolist() == list(range(1, 17))
    lines = packed[0, 64:].view(32, 16, 4).int() - 128
    assert (lines != 0).nonzero().tolist() == [[1, 3, 1], [17, 3, 2]]
    assert (lines[1, 3, 1], lines[17, 3, 2]) == (100, -7)


def test_nibbles_lie_as_the_documentation_says() -> None:
    """Row 3 alone has numbers: input 5 is a low nibble of line 1, input 21 the high one beside it; input 38
    is the low one of line 1 of the second 32.
    """
    values = torch.zeros(16, 64, dtype=torch.int64)
    values[3, 5], values[3, 21], values[3, 38] = 7, -8, -1
    scales = torch.arange(32.0).view(16, 2)
    (packed,) = pack(values, scales, kind="int4")
    assert packed.shape == (576,)
    assert packed[:64].view(torch.bfloat16).tolist() == scales.T.flatten().tolist()
    lines = packed[64:].view(2, 4, 16, 4).int()
    assert (lines != 0x88).nonzero().tolist() == [[0, 1, 3, 1], [1, 1, 3, 2]]
    assert lines[0, 1, 3, 1] == (7 + 8) | (-8 + 8) << 4
    assert lines[1, 1, 3, 2] == (-1 + 8) | 8 << 4


def test_values_and_scales_that_do_not_fit() -> None:
    values = torch.zeros(2, 40, dtype=torch.int64)
    with pytest.raises(SeekVLError, match=r"need scales \[2\], not \[2, 1\]"):
        pack(values, torch.ones(2, 1), kind="int8")
    with pytest.raises(SeekVLError, match=r"need scales \[2, 2\], not \[2\]"):
        pack(values, torch.ones(2), kind="int4")
    with pytest.raises(SeekVLError, match=r"int8 holds -127..127, not -128..0"):
        pack(values.index_fill(0, torch.tensor(0), -128), torch.ones(2), kind="int8")
    with pytest.raises(SeekVLError, match=r"int4 holds -8..7, not 0..8"):
        pack(values.index_fill(0, torch.tensor(0), 8), torch.ones(2, 2), kind="int4")


@EACH
def test_inputs_are_rounded_to_127_steps_of_their_group(kind: Kind) -> None:
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    x[0, :200] = 0.0
    x[1] *= 1e-35
    found = rounded_inputs(x, kind=kind)
    size = INPUT_GROUP[kind]
    for begin in range(0, 300, size):
        group, rounded = x[:, begin : begin + size], found[:, begin : begin + size]
        step = group.abs().amax(dim=1, keepdim=True) / 127
        assert ((rounded - group).abs() <= step * 0.501)[0::2].all()
    assert found[0, :192].eq(0).all()
    assert found[1].eq(0).all(), "a group below 2^-100 counts as zero"


@EACH
def test_what_is_not_finite_stays_so(kind: Kind) -> None:
    x = torch.ones(2, 200)
    x[0, 3], x[1, 199] = torch.inf, torch.nan
    found = rounded_inputs(x, kind=kind)
    size = INPUT_GROUP[kind]
    assert found[0, :size].isnan().all()
    assert torch.equal(found[0, size:], torch.ones(200 - size))
    assert found[1, 199 // size * size :].isnan().all()


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_layer_multiplies_rounded_inputs_with_stored_weights(kind: Kind, dtype: torch.dtype) -> None:
    values, scales, matrix = numbers(kind, 20, 70)
    layer = QuantizedLinear(70, 20, kind=kind, bias=nn.Parameter(torch.ones(20, dtype=dtype)))
    layer.packed = pack(values, scales, kind=kind)
    x = torch.randn(2, 3, 70).to(dtype)
    wanted = rounded_inputs(x, kind=kind) @ matrix.T + 1
    found = layer(x)
    assert found.dtype == dtype
    assert torch.allclose(found, wanted.to(dtype))
    assert list(layer.state_dict()) == ["bias", "packed"]


def experts_like(kind: Kind) -> tuple[QuantizedExperts, dict[str, Tensor]]:
    """Three experts of width 20 and 40 channels, and their matrices."""
    module = QuantizedExperts(3, channels=40, width=20, kind=kind)
    matrices = {}
    for seed, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        rows, width = module.shape(name)
        parts = [numbers(kind, rows, width) for _ in range(3)]
        factors = [(0.02 if kind == "int4" else 0.002) * (1 + seed + expert) for expert in range(3)]
        for expert, (values, scales, _) in enumerate(parts):
            scaled = (scales * factors[expert]).bfloat16().float()
            module.get_buffer(name)[expert] = pack(values, scaled, kind=kind)
        matrices[name] = torch.stack([module.unpacked(name, expert) for expert in range(3)])
    return module, matrices


@EACH
def test_experts_equal_their_matrices(kind: Kind) -> None:
    module, matrices = experts_like(kind)
    x, chosen, weights = torch.randn(4, 40), torch.tensor([[0, 2], [1, 0], [2, 2], [1, 2]]), torch.rand(4, 2)
    wanted = torch.zeros(4, 40)
    for token in range(4):
        seen = rounded_inputs(x[token], kind=kind)
        for slot in range(2):
            expert = chosen[token, slot]
            gate, up = (matrices[name][expert] @ seen for name in ("gate_proj", "up_proj"))
            hidden = rounded_inputs(nn.functional.silu(gate) * up, kind=kind)
            wanted[token] += weights[token, slot] * (matrices["down_proj"][expert] @ hidden)
    assert torch.allclose(module(x, experts=chosen, weights=weights), wanted, rtol=1e-4, atol=1e-5)


def test_a_gradient_is_refused() -> None:
    layer, x = QuantizedLinear(64, 16, kind="int8"), torch.ones(1, 64, requires_grad=True)
    with pytest.raises(SeekVLError, match="gives no gradient: train the checkpoint it was made from"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (1, 16)


def test_places_of_quantised_modules_are_found() -> None:
    config = MoeConfig(experts=4, active=2, shared=0, width=8, scoring="softmax", choice="greedy")
    model = nn.ModuleDict({"a": nn.Linear(70, 20), "b": Experts(16, config), "c": nn.Conv2d(1, 1, 1)})
    linear = quantized_like(model["a"], "int4")
    assert isinstance(linear, QuantizedLinear)
    assert (linear.in_features, linear.out_features, linear.bias is model["a"].bias) == (70, 20, True)
    stack = quantized_like(model["b"], "int8")
    assert isinstance(stack, QuantizedExperts)
    assert (stack.count, stack.channels, stack.width) == (4, 16, 8)
    assert stack.gate_proj.shape == (4, *packed_shape("int8", 8, 16))
    assert stack.down_proj.shape == (4, *packed_shape("int8", 16, 8))
    with pytest.raises(SeekVLError, match="a Conv2d cannot be quantised"):
        quantized_like(model["c"], "int8")
    model["a"] = linear
    assert quantized_modules(model) == {"a": linear}
