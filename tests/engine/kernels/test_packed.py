import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from seekvl.engine.kernels.compiled import LEVELS, PATH, Library, library
from seekvl.engine.kernels.packed import NUMBERS, packed_experts, packed_linear
from seekvl.engine.kernels.products import DTYPES
from seekvl.models.quantized import (
    KINDS,
    RANGE,
    Kind,
    QuantizedExperts,
    pack,
    packed_shape,
    rounded_inputs,
)
from seekvl.runtime import SeekVLError
from tests.models.test_quantized import EACH, SHAPES, experts_like, numbers

ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 31)
"""All that have a loop of their own on some level, and some between."""
MANY = (96, 97, 98, 100, 673)
"""About the border to products of many rows, and more than go through them at once."""
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, matrix: Tensor, bias: Tensor, *, kind: Kind) -> tuple[Tensor, Tensor]:
    """The product of what the kernels see, in float64, and what rounding groups and the end may change."""
    seen = rounded_inputs(x, kind=kind).double()
    value = seen @ matrix.double().T + bias.double()
    total = seen.abs() @ matrix.double().abs().T + bias.double().abs()
    groups = -(-x.shape[-1] // 32) + 8
    return value, groups * 2.0**-23 * total + UNIT[x.dtype] * value.abs() * (1 + 1e-6) + 2.0**-25


@EACH
@ALL_DTYPES
def test_every_number_of_rows_and_odd_shape_stays_in_the_bound(
    level: str, dtype: torch.dtype, kind: Kind
) -> None:
    for o, i in SHAPES:
        values, scales, matrix = numbers(kind, o, i)
        packed, bias = pack(values, scales, kind=kind), randn(o, seed=o, dtype=dtype)
        for b in (*ROWS, 130) if (o, i) == (33, 130) else (1, 3, 12, 130):
            x = randn(b, i, seed=b, dtype=dtype)
            value, bound = exact(x, matrix, bias, kind=kind)
            found = packed_linear(x, packed, bias, kind=kind, rows=o, level=level, threads=2)
            assert found.dtype == dtype
            assert (found.double() - value).abs().le(bound).all(), (o, i, b)


@EACH
def test_the_largest_numbers_do_not_overflow(level: str, kind: Kind) -> None:
    """All values and inputs at an end of their range, in a matrix whose sum as one whole number would."""
    width = 1 << 18
    for end in RANGE[kind]:
        scales = torch.ones(1) if kind == "int8" else torch.ones(1, width // 32)
        packed = pack(torch.full((1, width), end), scales, kind=kind)
        for sign in (1.0, -1.0):
            found = packed_linear(
                torch.full((2, width), 127.0 * sign), packed, kind=kind, rows=1, level=level, threads=1
            )
            assert torch.allclose(found, torch.tensor(127.0 * sign * end * width), rtol=1e-4)


@EACH
def test_a_row_among_others_equals_the_row_alone_bit_for_bit(level: str, kind: Kind) -> None:
    """Decoding and prompts give the same numbers, however rows come together and whoever computes them."""
    values, scales, _ = numbers(kind, 70, 300)
    packed, x = pack(values, scales, kind=kind), randn(max(MANY), 300, seed=2)
    alone = torch.cat([packed_linear(row[None], packed, kind=kind, rows=70, level=level) for row in x])
    for b in (*ROWS, 40, *MANY):
        for threads in (1, 3):
            found = packed_linear(x[:b], packed, kind=kind, rows=70, level=level, threads=threads)
            assert torch.equal(found, alone[:b])


def test_levels_agree_in_whole_numbers(native: Library) -> None:
    """In int8 only the sums of groups are rounded; with one group all levels give the same bits."""
    values, scales, _ = numbers("int8", 33, 120)
    packed, x = pack(values, scales, kind="int8"), randn(9, 120, seed=5)
    found = [packed_linear(x, packed, kind="int8", rows=33, level=name) for name in native.levels]
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-6, atol=1e-7)


@EACH
def test_what_is_not_finite_reaches_the_result(level: str, kind: Kind) -> None:
    values, scales, _ = numbers(kind, 20, 200)
    packed, x = pack(values, scales, kind=kind), torch.ones(4, 200)
    x[0, 7], x[1, 199], x[2] = torch.inf, torch.nan, 1e-36
    found = packed_linear(x, packed, kind=kind, rows=20, level=level)
    assert found[:2].isnan().all()
    assert found[2].eq(0).all()
    assert found[3].isfinite().all()


@EACH
def test_nothing_is_touched_behind_the_buffers(level: str, kind: Kind) -> None:
    """Every buffer ends where a page ends, and the next page must not be touched."""
    library_c, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

    def at_the_end(tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        pages = -(-size // page)
        memory = mmap.mmap(-1, (pages + 1) * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if library_c.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0):
            pytest.skip("memory cannot be protected here")
        kept.append((memory, start + pages * page))
        view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * page - size)
        return view.view(tensor.shape).copy_(tensor)

    for o, i in SHAPES:
        values, scales, _ = numbers(kind, o, i)
        packed = pack(values, scales, kind=kind)
        for b in (1, 4, 13, 130):
            x, y = randn(b, i, seed=3), at_the_end(torch.zeros(b, o))
            arguments = [at_the_end(tensor).data_ptr() for tensor in (packed, torch.ones(o), x)]
            code = (LEVELS.index(level), 1, NUMBERS[kind], DTYPES[torch.float32])
            library().packed_linear(*code, *arguments, y.data_ptr(), b, o, i)
            assert torch.equal(y, packed_linear(x, packed, torch.ones(o), kind=kind, rows=o, level=level))
    for memory, start in kept:
        library_c.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)
        del memory


@EACH
def test_any_axes_any_strides_and_nothing_to_do(level: str, kind: Kind) -> None:
    values, scales, _ = numbers(kind, 20, 48)
    packed, x = pack(values, scales, kind=kind), randn(2, 3, 48, seed=6)
    flat = packed_linear(x.flatten(0, 1), packed, kind=kind, rows=20, level=level)
    assert torch.equal(packed_linear(x, packed, kind=kind, rows=20, level=level), flat.unflatten(0, (2, 3)))
    swapped = packed_linear(x.transpose(0, 1), packed, kind=kind, rows=20, level=level)
    assert torch.equal(swapped, flat.unflatten(0, (2, 3)).transpose(0, 1))
    assert packed_linear(x[:0], packed, kind=kind, rows=20, level=level).shape == (0, 3, 20)


def test_two_python_threads_at_once(level: str) -> None:
    values, scales, _ = numbers("int4", 200, 256)
    packed = pack(values, scales, kind="int4")
    inputs = [randn(1 + n % 15, 256, seed=n) for n in range(30)]
    wanted = [packed_linear(x, packed, kind="int4", rows=200, level=level, threads=1) for x in inputs]
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(
                lambda x: packed_linear(x, packed, kind="int4", rows=200, level=level, threads=2), inputs
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Experts


def through(module: QuantizedExperts, x: Tensor, chosen: Tensor, weights: Tensor, **more: Any) -> Tensor:
    stacks = {"gate": module.gate_proj, "up": module.up_proj, "down": module.down_proj}
    shape = {"kind": module.kind, "width": module.width}
    arguments: dict[str, Any] = {"experts": chosen, "weights": weights} | stacks | shape | more
    return packed_experts(x, **arguments)


@EACH
@ALL_DTYPES
@pytest.mark.parametrize("n", [1, 5, 30, 600])
def test_experts_equal_those_that_torch_unpacks(level: str, dtype: torch.dtype, kind: Kind, n: int) -> None:
    """30 tokens meet an expert by the dozen, 600 are more than go through at once. A hidden number that lies
    on the border of two steps may fall either way, which is a hundredth of one input.
    """
    module, _ = experts_like(kind)
    generator = torch.Generator().manual_seed(n)
    x, weights = randn(n, 40, seed=n, dtype=dtype), torch.rand(n, 2, generator=generator)
    chosen = torch.randint(0, 3, (n, 2), generator=generator)
    wanted = module(x, experts=chosen, weights=weights).float()
    found = through(module, x, chosen, weights, level=level, threads=2)
    assert found.dtype == dtype
    difference = (found.float() - wanted).abs() / wanted.abs().amax(dim=1, keepdim=True)
    assert difference.max() < 0.05
    assert difference.mean() < max(2e-4, UNIT[dtype])


@EACH
def test_a_token_among_others_equals_the_token_alone(level: str, kind: Kind) -> None:
    module, _ = experts_like(kind)
    x, weights, chosen = randn(30, 40, seed=1), torch.rand(30, 2), torch.randint(0, 3, (30, 2))
    together = through(module, x, chosen, weights, level=level, threads=3)
    for n in range(30):
        row = slice(n, n + 1)
        alone = through(module, x[row], chosen[row], weights[row], level=level, threads=1)
        assert torch.equal(alone, together[row])


def test_experts_with_strides_and_none_at_all(level: str) -> None:
    module, _ = experts_like("int8")
    x, chosen, weights = torch.randn(40, 3).T, torch.tensor([[0, 1, 2], [2, 2, 0]]).T, torch.rand(2, 3).T
    plain = through(module, x.contiguous(), chosen.contiguous(), weights.contiguous(), level=level)
    assert torch.equal(through(module, x, chosen, weights, level=level), plain)
    empty = torch.zeros(0, 2, dtype=torch.int64)
    assert through(module, torch.ones(0, 40), empty, torch.ones(0, 2), level=level).shape == (0, 40)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(2, 4, dtype=torch.float64)}, "x is torch.float64"),
    ({"x": torch.ones(2, 4, device="meta")}, "x is torch.float32 on meta"),
    ({"x": torch.tensor(1.0)}, r"x \[\] has no numbers"),
    ({"x": torch.ones(2, 0)}, r"x \[2, 0\] has no numbers"),
    ({"x": torch.ones(2, 70)}, r"packed is \[1, 1088\]; in int8 it must be \[1, 2112\]"),
    ({"x": torch.ones(2, 4, requires_grad=True)}, "x needs a gradient"),
    ({"rows": 17}, r"packed is \[1, 1088\]; in int8 it must be \[2, 1088\]"),
    ({"kind": "int4"}, r"in int4 it must be \[1, 576\]"),
    ({"packed": torch.zeros(1, 1088)}, "packed is torch.float32"),
    ({"packed": torch.zeros(1, 2176, dtype=torch.uint8)[:, ::2]}, "a packed matrix is contiguous"),
    ({"bias": torch.ones(2)}, r"bias torch.float32 \[2\] on cpu does not fit 3 rows"),
    ({"bias": torch.ones(3, dtype=torch.bfloat16)}, "bias torch.bfloat16"),
    ({"threads": 0}, "threads must be at least 1"),
    ({"level": "mmx"}, "'mmx' is unknown"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_named(native: Library, change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "x": torch.ones(2, 4),
        "packed": pack(torch.ones(3, 4), torch.ones(3), kind="int8"),
        "bias": torch.ones(3),
        "kind": "int8",
        "rows": 3,
    }
    assert packed_linear(**good).tolist() == [[5.0] * 3] * 2
    with pytest.raises(SeekVLError, match=message):
        packed_linear(**good | change)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"chosen": torch.tensor([[0, 3]])}, "expert 0 or 3 is none of 3 experts"),
    ({"chosen": torch.tensor([[-1, 2]])}, "expert -1 or 2 is none of 3"),
    ({"chosen": torch.tensor([[0]])}, r"experts \[1, 1\] and weights \[1, 2\] do not fit"),
    ({"chosen": torch.tensor([[0, 2]], dtype=torch.int32)}, "experts are torch.int32"),
    ({"weights": torch.ones(1, 2, dtype=torch.float64)}, "weights are torch.float64"),
    ({"x": torch.ones(40)}, "do not fit"),
    ({"x": torch.ones(1, 90)}, r"gate is \[3, 2, 1088\]; in int8 it must be \[3, 2, 2112\]"),
    ({"down": torch.zeros(2, 3, 1088, dtype=torch.uint8)}, r"down is \[2, 3, 1088\]"),
    ({"width": 33}, "gate is"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_experts_are_named(native: Library, change: dict[str, Any], message: str) -> None:
    module, _ = experts_like("int8")
    good: dict[str, Any] = {
        "x": torch.ones(1, 40),
        "chosen": torch.tensor([[0, 2]]),
        "weights": torch.ones(1, 2),
    }
    assert through(module, **good).shape == (1, 40)
    with pytest.raises(SeekVLError, match=message):
        through(module, **good | change)


def test_shapes_agree_with_the_library(native: Library) -> None:
    """Python and C++ each say how large a packed matrix is."""
    bytes_of = ctypes.CDLL(str(PATH)).seekvl_packed_bytes
    bytes_of.restype, bytes_of.argtypes = ctypes.c_int64, [ctypes.c_int32, ctypes.c_int64, ctypes.c_int64]
    for kind in KINDS:
        for o, i in SHAPES:
            tiles, size = packed_shape(kind, o, i)
            assert bytes_of(NUMBERS[kind], o, i) == tiles * size
