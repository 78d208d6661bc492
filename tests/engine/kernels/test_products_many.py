"""More rows than stream the weights: packed in blocks, in waves, and through experts by the hundred."""

import ctypes
import mmap
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seekvl.engine.kernels.compiled import LEVELS, Library, library
from seekvl.engine.kernels.products import DTYPES, MAX_ROWS, linear, swiglu_experts
from seekvl.models.moe import Experts
from tests.engine.kernels.test_products import ALL_DTYPES, SHAPES, exact, randn, stacks, through

COUNTS = (9, 16, 25, 48, 49, 70)
"""Rows around the lanes of vectors and of blocks."""


@ALL_DTYPES
def test_every_count_and_odd_shape_stays_in_the_bound(level: str, dtype: torch.dtype) -> None:
    for seed, (o, i) in enumerate((*SHAPES, (40, 700))):
        weight, bias = randn(o, i, seed=seed, dtype=dtype), randn(o, seed=seed + 50, dtype=dtype)
        for b in COUNTS:
            x = randn(b, i, seed=seed + 100 * b, dtype=dtype)
            for given, addend in ((x, None), (x, bias), (x.float(), bias)):
                found = linear(given, weight, addend, level=level, threads=2)
                value, bound = exact(given, weight, addend)
                assert found.dtype == given.dtype
                assert (found.double() - value).abs().le(bound).all(), (o, i, b, given.dtype)


@ALL_DTYPES
def test_a_row_is_the_same_among_any_others(level: str, dtype: torch.dtype) -> None:
    """300 rows are two waves of one thread."""
    weight, x = randn(37, 331, seed=1, dtype=dtype), randn(300, 331, seed=2, dtype=dtype)
    whole = linear(x, weight, level=level, threads=1)
    for begin, end in ((0, 9), (100, 117), (290, 300), (40, 97)):
        assert torch.equal(linear(x[begin:end], weight, level=level), whole[begin:end])
    mixed = torch.randperm(300)
    assert torch.equal(linear(x[mixed], weight, level=level), whole[mixed])


@ALL_DTYPES
def test_threads_change_no_bit(level: str, dtype: torch.dtype) -> None:
    weight, x = randn(150, 65, seed=3, dtype=dtype), randn(130, 65, seed=4, dtype=dtype)
    results = [linear(x, weight, level=level, threads=threads) for threads in range(1, 5)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_number_is_read_and_rounded_as_torch_does(level: str, dtype: torch.dtype) -> None:
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).unsqueeze(1)
    x = torch.tensor([[1.0], [1.5], [0.3125]] * 3, dtype=dtype)
    found, products = linear(x, weight, level=level), x.float() * weight.float().T
    wanted = (products + 0.0).to(dtype)
    if level == "avx512_bf16" and dtype == torch.bfloat16:
        tiny = torch.finfo(torch.float32).tiny
        wanted[(weight.float().T.abs() < tiny).expand_as(wanted) | (products.abs() < tiny)] = 0.0
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[~found.isnan()], wanted[~wanted.isnan()])


def test_infinities_and_nan_stay_in_their_row(level: str) -> None:
    x = torch.ones(20, 40)
    x[3, 39], x[7, 0] = torch.inf, torch.nan
    found = linear(x, torch.ones(5, 40), level=level)
    assert (found[3] == torch.inf).all()
    assert found[7].isnan().all()
    assert (found[[row for row in range(20) if row not in (3, 7)]] == 40).all()


def test_nothing_to_multiply(level: str) -> None:
    bias = torch.arange(3.0)
    assert torch.equal(linear(torch.ones(9, 0), torch.ones(3, 0), bias, level=level), bias.expand(9, 3))
    assert linear(torch.ones(9, 4), torch.ones(0, 4), level=level).shape == (9, 0)


def protected(kept: list[tuple[mmap.mmap, int]]) -> Callable[[Tensor], Tensor]:
    """Return a function that moves a tensor to where a page ends, before one that must not be touched."""
    library_c, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE

    def at_the_end(tensor: Tensor) -> Tensor:
        pages = -(-tensor.nbytes // page)
        memory = mmap.mmap(-1, (pages + 1) * page)
        end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * page
        if library_c.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0):
            pytest.skip("memory cannot be protected here")
        kept.append((memory, end))
        offset = pages * page - tensor.nbytes
        view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return view.view(tensor.shape).copy_(tensor)

    return at_the_end


def unprotect(kept: list[tuple[mmap.mmap, int]]) -> None:
    library_c, both = ctypes.CDLL(None), mmap.PROT_READ | mmap.PROT_WRITE
    for _, end in kept:
        library_c.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), both)


@ALL_DTYPES
def test_nothing_is_touched_behind_the_buffers(level: str, dtype: torch.dtype) -> None:
    kept: list[tuple[mmap.mmap, int]] = []
    at_the_end, kind = protected(kept), DTYPES[dtype]
    for o, i in SHAPES:
        for b in (9, 17):
            tensors = [randn(*shape, seed=b, dtype=dtype) for shape in ((o, i), (o,), (b, i))]
            weight, bias, x = map(at_the_end, tensors)
            y = at_the_end(torch.zeros(b, o, dtype=dtype))
            w, a, u, v = (t.data_ptr() for t in (weight, bias, x, y))
            assert library().linear_many(LEVELS.index(level), 1, kind, kind, w, a, u, v, b, o, i) == 0
            assert torch.equal(y, linear(tensors[2], tensors[0], tensors[1], level=level))
    unprotect(kept)


@ALL_DTYPES
def test_experts_touch_nothing_behind_the_buffers(level: str, dtype: torch.dtype) -> None:
    kept: list[tuple[mmap.mmap, int]] = []
    at_the_end = protected(kept)
    for m, d in ((1, 1), (3, 5), (16, 17), (33, 24)):
        model = stacks(dtype, count=3, width=m, channels=d)
        x, chosen, weights = (
            randn(11, d, seed=m, dtype=dtype),
            torch.randint(0, 3, (11, 2)),
            torch.rand(11, 2),
        )
        wanted = through(model, x, chosen, weights, level=level)
        names = ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (at_the_end(getattr(model, name)) for name in names)
        ends = [at_the_end(tensor) for tensor in (x, chosen, weights)]
        found = swiglu_experts(
            ends[0], experts=ends[1], weights=ends[2], gate=gate, up=up, down=down, level=level
        )
        assert torch.equal(found, wanted)
    unprotect(kept)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)], ids=str
)
@pytest.mark.parametrize(("width", "channels"), [(40, 50), (39, 51), (1, 8), (64, 33)])
def test_experts_equal_the_grouped_products(
    level: str, dtype: torch.dtype, tolerance: float, width: int, channels: int
) -> None:
    """Expert 2 has no tokens; tolerances as in decoding."""
    model = stacks(dtype, width=width, channels=channels)
    for n in (9, 50, 130):
        x, weights = randn(n, channels, seed=n, dtype=dtype), torch.rand(n, 3)
        chosen = torch.stack([torch.tensor([0, 1, 3, 4, 5])[torch.randperm(5)[:3]] for _ in range(n)])
        wanted = model.float()(x.float(), experts=chosen, weights=weights)
        model.to(dtype)
        for threads in (1, 3):
            found = through(model, x, chosen, weights, level=level, threads=threads)
            assert found.dtype == dtype
            assert (found.float() - wanted).abs().max() < tolerance


def assert_as_torch(model: Experts, x: Tensor, chosen: Tensor, weights: Tensor, level: str) -> None:
    wanted = model(x, experts=chosen, weights=weights)
    assert torch.allclose(through(model, x, chosen, weights, level=level), wanted, atol=3e-6, rtol=0)


def test_all_tokens_may_want_one_expert_and_more_than_once(level: str) -> None:
    """390 slots of one expert are more than a wave of one thread, and more than any block."""
    model, x, weights = stacks(torch.float32), randn(130, 50, seed=1, dtype=torch.float32), torch.rand(130, 3)
    assert_as_torch(model, x, torch.full((130, 3), 5), weights, level)
    assert_as_torch(model, x, torch.tensor([[0, 5, 0]]).repeat(130, 1), weights, level)


def test_more_tokens_than_sums_are_kept_for(level: str) -> None:
    model = stacks(torch.float32, width=5, channels=6)
    x, weights = randn(2051, 6, seed=1, dtype=torch.float32), torch.rand(2051, 1)
    assert_as_torch(model, x, torch.randint(0, 6, (2051, 1)), weights, level)


@ALL_DTYPES
def test_a_token_is_the_same_among_any_others_and_with_any_threads(level: str, dtype: torch.dtype) -> None:
    model, x, weights = stacks(dtype), randn(200, 50, seed=3, dtype=dtype), torch.rand(200, 3)
    chosen = torch.stack([torch.randperm(6)[:3] for _ in range(200)])
    whole = through(model, x, chosen, weights, level=level, threads=1)
    assert torch.equal(through(model, x, chosen, weights, level=level, threads=4), whole)
    for rows in (slice(0, 9), slice(90, 160), torch.randperm(200)):
        assert torch.equal(through(model, x[rows], chosen[rows], weights[rows], level=level), whole[rows])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_too(native: Library) -> None:
    weight, x = randn(300, 70, seed=8, dtype=torch.float32), randn(60, 70, seed=9, dtype=torch.float32)
    wanted = linear(x, weight, threads=3)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs must not outlive the test
        os._exit(0 if torch.equal(linear(x, weight, threads=3), wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_strides_and_no_experts_at_all(level: str) -> None:
    model = stacks(torch.float32)
    x, chosen, weights = torch.randn(50, 20).T, torch.randint(0, 6, (3, 20)).T, torch.rand(3, 20).T
    wanted = model(x.contiguous(), experts=chosen.contiguous(), weights=weights.contiguous())
    assert torch.allclose(through(model, x, chosen, weights, level=level), wanted, atol=1e-6, rtol=0)
    none = torch.zeros(20, 0, dtype=torch.int64)
    assert not through(model, torch.ones(20, 50), none, torch.ones(20, 0), level=level).any()


def test_gates_of_any_size(level: str) -> None:
    """silu from where it vanishes to where it is the identity, and as torch's at infinities and NaN."""
    gates = torch.cat((torch.linspace(-110, 110, 4001), torch.tensor([torch.inf, -torch.inf, torch.nan])))
    one, chosen = torch.ones(1, 1, 1), torch.zeros(len(gates), 1, dtype=torch.int64)
    found = swiglu_experts(
        gates.unsqueeze(1), experts=chosen, weights=chosen + 1.0, gate=one, up=one, down=one, level=level
    )[:, 0]
    wanted = (torch.nn.functional.silu(gates.double()) * gates.double()).float()
    finite = wanted.isfinite()
    assert torch.allclose(found[finite], wanted[finite], rtol=1e-6, atol=1e-34)
    assert torch.equal(found[~finite].isnan(), wanted[~finite].isnan())
    assert found[-3] == torch.inf


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the size of the process")
def test_no_memory_is_an_error_and_no_end(native: Library) -> None:
    """Packing takes 130 MB, of which there are 16."""
    x, weight = torch.ones(MAX_ROWS * 32, 1 << 17), torch.ones(1, 1 << 17)
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), before[1]))
    try:
        with pytest.raises(MemoryError, match=r"no memory to multiply 256 rows with a matrix \[1, 131072\]"):
            linear(x, weight, threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert (linear(x, weight, threads=1) == 1 << 17).all()
