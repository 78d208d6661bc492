import ctypes
import mmap
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from seekvl.engine.kernels.compiled import LEVELS, Library, library
from seekvl.engine.kernels.products import DTYPES, MAX_ROWS, linear, swiglu_experts
from seekvl.models.moe import Experts, MoeConfig
from seekvl.runtime import SeekVLError

ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = ((1, 1), (3, 7), (2, 15), (5, 16), (4, 17), (7, 31), (6, 32), (3, 33), (9, 64), (2, 127), (70, 200))
"""Rows and widths around the lengths of vectors, and of several vectors at once."""
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit of the last place, relative; float32 has the bound of its sum alone."""


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product in float64, and the largest error the documentation allows for each element."""
    wide = [x.double(), weight.double(), torch.zeros(len(weight)) if bias is None else bias.double()]
    value = wide[0] @ wide[1].T + wide[2]
    total = wide[0].abs() @ wide[1].abs().T + wide[2].abs()
    return value, (x.shape[-1] + 1) * 2.0**-24 * total + UNIT[x.dtype] * value.abs() * (1 + 1e-6) + 2.0**-25


@ALL_DTYPES
def test_every_batch_and_odd_shape_stays_in_the_bound(level: str, dtype: torch.dtype) -> None:
    for seed, (o, i) in enumerate(SHAPES):
        weight, bias = randn(o, i, seed=seed, dtype=dtype), randn(o, seed=seed + 50, dtype=dtype)
        for b in range(1, MAX_ROWS + 1):
            x = randn(b, i, seed=seed + 100 * b, dtype=dtype)
            for given, addend in ((x, None), (x, bias), (x.float(), bias)):
                found = linear(given, weight, addend, level=level, threads=2)
                value, bound = exact(given, weight, addend)
                assert found.dtype == given.dtype
                assert (found.double() - value).abs().le(bound).all(), (o, i, b, given.dtype)


@ALL_DTYPES
def test_rows_of_a_batch_equal_single_rows_bit_for_bit(level: str, dtype: torch.dtype) -> None:
    weight = randn(37, 331, seed=1, dtype=dtype)
    x = randn(MAX_ROWS, 331, seed=2, dtype=dtype)
    alone = torch.stack([linear(row, weight, level=level) for row in x])
    for b in range(1, MAX_ROWS + 1):
        assert torch.equal(linear(x[:b], weight, level=level), alone[:b])


@ALL_DTYPES
def test_the_number_of_threads_changes_no_bit(level: str, dtype: torch.dtype) -> None:
    weight, x = randn(1500, 129, seed=3, dtype=dtype), randn(3, 129, seed=4, dtype=dtype)
    results = [linear(x, weight, level=level, threads=threads) for threads in range(1, 5)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.5, 0.3125])
def test_every_half_number_is_read_and_rounded_as_torch_does(
    level: str, dtype: torch.dtype, factor: float
) -> None:
    """All 65,536 of them as rows of width 1: zeros, subnormals, infinities, NaN."""
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).unsqueeze(1)
    x = torch.tensor([[factor]], dtype=dtype)
    found = linear(x, weight, level=level)[0]
    wanted = (weight.float() * factor + 0.0).to(dtype)[:, 0]
    if level == "avx512_bf16" and dtype == torch.bfloat16:
        tiny = torch.finfo(torch.float32).tiny
        flushed = (weight.float().abs() < tiny) | ((weight.float() * factor).abs() < tiny)
        wanted = torch.where(flushed[:, 0], 0.0, wanted)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[~found.isnan()], wanted[~wanted.isnan()])


def test_infinities_and_nan_reach_the_result(level: str) -> None:
    weight = torch.ones(4, 40)
    weight[1, 39], weight[2, 3], weight[3, 0] = torch.inf, torch.nan, -torch.inf
    found = linear(torch.ones(2, 40), weight, level=level)
    for row in found:
        assert row[0] == 40
        assert row[1] == torch.inf
        assert row[2].isnan()
        assert row[3] == -torch.inf


@ALL_DTYPES
def test_nothing_is_touched_behind_the_buffers(level: str, dtype: torch.dtype) -> None:
    """Every buffer ends where a page ends, and the next page must not be touched."""
    library_c = ctypes.CDLL(None, use_errno=True)
    page, kept = mmap.PAGESIZE, []

    def at_the_end(tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        pages = -(-size // page)
        memory = mmap.mmap(-1, (pages + 1) * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if library_c.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0):
            pytest.skip("memory cannot be protected here")
        kept.append((memory, start + pages * page, library_c))
        view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * page - size)
        return view.view(tensor.shape).copy_(tensor)

    call = library().linear
    for o, i in SHAPES:
        for b in (1, 2, 3, 4, 8):
            weight = at_the_end(randn(o, i, seed=1, dtype=dtype))
            bias = at_the_end(randn(o, seed=2, dtype=dtype))
            x = at_the_end(randn(b, i, seed=3, dtype=dtype))
            y = at_the_end(torch.zeros(b, o, dtype=dtype))
            kind, (w, a, u, v) = DTYPES[dtype], (t.data_ptr() for t in (weight, bias, x, y))
            call(LEVELS.index(level), 1, kind, kind, w, a, u, v, b, o, i)
            assert torch.equal(y, linear(x.clone(), weight.clone(), bias.clone(), level=level))
    for memory, start, _ in kept:
        library_c.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)
        del memory


def test_any_number_of_axes_and_any_strides(level: str) -> None:
    weight, x = randn(20, 48, seed=5, dtype=torch.float32), randn(2, 3, 48, seed=6, dtype=torch.float32)
    flat = linear(x.flatten(0, 1), weight, level=level)
    assert torch.equal(linear(x, weight, level=level), torch.unflatten(flat, 0, (2, 3)))
    assert torch.equal(linear(x[0, 0], weight, level=level), flat[0])
    strided = x.transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(linear(strided, weight, level=level), torch.unflatten(flat, 0, (2, 3)).transpose(0, 1))


def test_nothing_to_do(level: str) -> None:
    assert linear(torch.ones(0, 4), torch.ones(3, 4), level=level).shape == (0, 3)
    assert linear(torch.ones(2, 4), torch.ones(0, 4), level=level).shape == (2, 0)
    bias = torch.arange(3.0)
    assert torch.equal(linear(torch.ones(2, 0), torch.ones(3, 0), bias, level=level), bias.expand(2, 3))


def test_two_python_threads_at_once(level: str) -> None:
    weight = randn(700, 300, seed=7, dtype=torch.float32)
    inputs = [randn(1 + n % 4, 300, seed=n, dtype=torch.float32) for n in range(60)]
    wanted = [linear(x, weight, level=level, threads=1) for x in inputs]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda x: linear(x, weight, level=level, threads=2), inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_too(native: Library) -> None:
    weight, x = randn(700, 300, seed=8, dtype=torch.float32), randn(2, 300, seed=9, dtype=torch.float32)
    wanted = linear(x, weight, threads=3)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs must not outlive the test
        same = torch.equal(linear(x, weight, threads=3), wanted)
        os._exit(0 if same and native.workers() == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(linear(x, weight, threads=3), wanted)


def test_no_copy_of_the_weight_is_kept(level: str) -> None:
    weight, x = torch.ones(8, 64), torch.ones(1, 64)
    assert linear(x, weight, level=level)[0, 0] == 64
    weight.mul_(2)
    assert linear(x, weight, level=level)[0, 0] == 128


GOOD: dict[str, Any] = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3)}
BAD = [
    ({"x": torch.ones(2, 5)}, r"x \[2, 5\] cannot be multiplied with weight \[3, 4\]"),
    ({"x": torch.tensor(1.0)}, r"x \[\] cannot be multiplied"),
    ({"x": torch.ones(2, 4, device="meta")}, "x is on meta"),
    ({"x": torch.ones(2, 4, dtype=torch.float64)}, "x is torch.float64"),
    ({"x": torch.ones(2, 4, dtype=torch.bfloat16)}, "x is torch.bfloat16; with a weight in torch.float32"),
    ({"x": torch.ones(2, 4, requires_grad=True)}, "x needs a gradient"),
    ({"weight": torch.ones(3, 4, 1)}, "cannot be multiplied"),
    ({"weight": torch.ones(4, 3).T}, "weight is torch.float32 on cpu and not contiguous"),
    ({"weight": torch.ones(3, 4, dtype=torch.int8)}, "weight is torch.int8"),
    ({"weight": torch.ones(3, 4, device="meta")}, "weight is torch.float32 on meta"),
    ({"weight": torch.ones(3, 4, requires_grad=True)}, "weight needs a gradient"),
    ({"bias": torch.ones(4)}, r"bias torch.float32 \[4\] does not fit weight"),
    ({"bias": torch.ones(3, dtype=torch.bfloat16)}, "bias torch.bfloat16"),
    ({"bias": torch.ones(6)[::2]}, "bias is torch.float32 on cpu and not contiguous"),
    ({"threads": 0}, "threads must be at least 1, not 0"),
    ({"level": "mmx"}, "'mmx' is unknown"),
    ({"level": "off"}, "switched off"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_named(native: Library, change: dict[str, Any], message: str) -> None:
    assert linear(**GOOD).shape == (2, 3)
    with pytest.raises(SeekVLError, match=message):
        linear(**GOOD | change)


# Experts


def stacks(dtype: torch.dtype, *, count: int = 6, width: int = 40, channels: int = 50) -> Experts:
    config = MoeConfig(experts=count, active=3, shared=0, width=width, scoring="softmax", choice="greedy")
    torch.manual_seed(0)
    return Experts(channels, config).to(dtype).requires_grad_(False)


def through(model: Experts, x: Tensor, experts: Tensor, weights: Tensor, **more: Any) -> Tensor:
    arguments = {"gate": model.gate_proj, "up": model.up_proj, "down": model.down_proj} | more
    return swiglu_experts(x, experts=experts, weights=weights, **arguments)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
    ids=str,
)
@pytest.mark.parametrize("active", [1, 3])
def test_experts_equal_those_of_the_network(
    level: str, dtype: torch.dtype, tolerance: float, active: int
) -> None:
    """Tolerances are half a unit of the last place of the dtype at the size of the results, about 0.5, with
    the hidden numbers and outputs that torch rounds on its way; the kernels round less often.
    """
    model = stacks(dtype)
    for n in range(1, MAX_ROWS + 1):
        x = randn(n, 50, seed=n, dtype=dtype)
        chosen = torch.stack([torch.randperm(6)[:active] for _ in range(n)])
        weights = torch.rand(n, active)
        wanted = model.float()(x.float(), experts=chosen, weights=weights)
        model.to(dtype)
        for threads in (1, 3):
            found = through(model, x, chosen, weights, level=level, threads=threads)
            assert found.dtype == dtype
            assert (found.float() - wanted).abs().max() < tolerance


def test_all_tokens_may_want_one_expert_and_more_than_once(level: str) -> None:
    """12 slots for one expert are more than meet a matrix at once."""
    model = stacks(torch.float32)
    x, weights = randn(4, 50, seed=1, dtype=torch.float32), torch.rand(4, 3)
    chosen = torch.full((4, 3), 5)
    wanted = model(x, experts=chosen, weights=weights)
    assert torch.allclose(through(model, x, chosen, weights, level=level), wanted, atol=1e-6, rtol=0)


@ALL_DTYPES
def test_a_token_among_others_equals_the_token_alone(level: str, dtype: torch.dtype) -> None:
    model, x, weights = stacks(dtype), randn(5, 50, seed=3, dtype=dtype), torch.rand(5, 3)
    chosen = torch.stack([torch.randperm(6)[:3] for _ in range(5)])
    together = through(model, x, chosen, weights, level=level, threads=2)
    for n in range(5):
        row = slice(n, n + 1)
        assert torch.equal(through(model, x[row], chosen[row], weights[row], level=level), together[row])


def test_experts_with_strides_and_none_at_all(level: str) -> None:
    model = stacks(torch.float32)
    x, chosen, weights = torch.randn(50, 2).T, torch.tensor([[0, 3], [1, 4], [2, 5]]).T, torch.rand(3, 2).T
    wanted = model(x.contiguous(), experts=chosen.contiguous(), weights=weights.contiguous())
    assert torch.allclose(through(model, x, chosen, weights, level=level), wanted, atol=1e-6, rtol=0)
    empty = torch.zeros(0, 3, dtype=torch.int64)
    assert through(model, torch.ones(0, 50), empty, torch.ones(0, 3), level=level).shape == (0, 50)


WRONG = [
    ({"experts": torch.tensor([[0, 6, 1]])}, "expert 0 or 6 is none of 6 experts"),
    ({"experts": torch.tensor([[-1, 2, 1]])}, "expert -1 or 2 is none of 6"),
    ({"experts": torch.tensor([[0, 2]])}, r"experts \[1, 2\] and weights \[1, 3\] do not fit"),
    ({"experts": torch.tensor([[0, 2, 1]], dtype=torch.int32)}, "experts are torch.int32"),
    ({"weights": torch.ones(1, 3, dtype=torch.float64)}, "weights are torch.float64"),
    ({"x": torch.ones(1, 49)}, r"x \[1, 49\] cannot be multiplied with gate"),
    ({"x": torch.ones(50)}, "do not fit"),
    ({"x": torch.ones(2, 50)}, r"x \[2, 50\], experts \[1, 3\]"),
    ({"x": torch.ones(9, 50)}, r"x \[9, 50\], experts \[1, 3\]"),
    ({"x": torch.ones(1, 50, dtype=torch.bfloat16)}, "x is torch.bfloat16, gate torch.float32"),
    ({"up": torch.ones(6, 41, 50)}, "are not the matrices of the same experts"),
    ({"down": torch.ones(6, 40, 50)}, "are not the matrices of the same experts"),
    ({"down": torch.ones(6, 40, 50).mT}, "down is torch.float32 on cpu and not contiguous"),
    ({"gate": torch.ones(40, 50)}, "cannot be multiplied with gate"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_experts_are_named(native: Library, change: dict[str, Any], message: str) -> None:
    model = stacks(torch.float32)
    good: dict[str, Any] = {
        "x": torch.ones(1, 50),
        "experts": torch.tensor([[0, 2, 1]]),
        "weights": torch.ones(1, 3),
        "gate": model.gate_proj,
        "up": model.up_proj,
        "down": model.down_proj,
    }
    assert swiglu_experts(**good).shape == (1, 50)
    with pytest.raises(SeekVLError, match=message):
        swiglu_experts(**good | change)


def test_memory_is_read_whole(native: Library) -> None:
    """The ceiling would flatter a reader that leaves something out: the sum of all words says."""
    words = torch.arange(100_000, dtype=torch.int64)
    assert native.read(3, words.data_ptr(), words.nbytes) == int(words.sum())
