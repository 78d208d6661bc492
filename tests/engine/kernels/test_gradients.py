"""Gradients of experts against those of float64, computed the slow and obvious way."""

import mmap
import resource
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seekvl.engine.kernels import memory
from seekvl.engine.kernels.compiled import LEVELS, Library, library
from seekvl.engine.kernels.gradients import learning_experts
from seekvl.engine.kernels.memory import GRADIENTS
from seekvl.engine.kernels.products import DTYPES
from seekvl.runtime import SeekVLError
from tests.engine.kernels.test_products import ALL_DTYPES, randn
from tests.engine.kernels.test_products_many import protected, unprotect

NAMES = ("x", "weights", "gate", "up", "down")
SHAPES = ((9, 2, 4, 5, 3), (70, 3, 5, 50, 40), (61, 2, 3, 101, 130), (1, 1, 2, 8, 8), (530, 2, 2, 17, 19))
"""n, k, E, m, d around vectors, panels and several of them; the last is more than a wave, and than what meets
a panel at once.
"""
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Of the norm: what is rounded once or twice, and sums of float32 in another order."""


class Case(NamedTuple):
    """What a layer of experts is given, and the gradient of what it gives."""

    x: Tensor
    weights: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    experts: Tensor
    grad: Tensor

    def learners(self) -> list[Tensor]:
        return [tensor.detach().clone().requires_grad_() for tensor in self[:5]]


def case(
    n: int, k: int, count: int, m: int, d: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    """Experts are drawn at random; the last has no tokens where there are more than two."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(0, count - 1 if count > 2 else count, (n, k), generator=generator)
    stacks = (
        randn(count, m, d, seed=seed + 1, dtype=torch.float32) * d**-0.5,
        randn(count, m, d, seed=seed + 2, dtype=torch.float32) * d**-0.5,
        randn(count, d, m, seed=seed + 3, dtype=torch.float32) * m**-0.5,
    )
    return Case(
        randn(n, d, seed=seed + 4, dtype=dtype),
        torch.rand(n, k, generator=generator),
        *(stack.to(dtype) for stack in stacks),
        experts,
        randn(n, d, seed=seed + 5, dtype=dtype),
    )


def learn(given: Case, tensors: list[Tensor], *, level: str | None = None) -> Tensor:
    """Go forward and backward through the kernels; gradients are left in `tensors`."""
    x, weights, gate, up, down = tensors
    y = learning_experts(x, experts=given.experts, weights=weights, gate=gate, up=up, down=down, level=level)
    y.backward(given.grad)
    return y.detach()


def gradients(given: Case, *, level: str | None = None) -> list[Tensor]:
    tensors = given.learners()
    learn(given, tensors, level=level)
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def obvious(given: Case) -> list[Tensor]:
    """Outputs and gradients in float64, one choice of all tokens after the other."""
    x, weights, gate, up, down = (tensor.detach().double().requires_grad_() for tensor in given[:5])
    y = torch.zeros_like(x)
    for choice in range(given.experts.shape[1]):
        expert = given.experts[:, choice]
        hidden = F.silu(torch.einsum("nd,nmd->nm", x, gate[expert])) * torch.einsum(
            "nd,nmd->nm", x, up[expert]
        )
        y = y + weights[:, choice : choice + 1] * torch.einsum("nm,ndm->nd", hidden, down[expert])
    y.backward(given.grad.double())
    return [y.detach(), *(tensor.grad for tensor in (x, weights, gate, up, down) if tensor.grad is not None)]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@ALL_DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_float64(
    level: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    given = case(*shape, dtype=dtype)
    tensors = given.learners()
    found, wanted = learn(given, tensors, level=level), obvious(given)
    assert apart(found, wanted[0]) < TOLERANCE[dtype]
    for name, tensor, right in zip(NAMES, tensors, wanted[1:], strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        assert apart(tensor.grad, right) < TOLERANCE[dtype], name


def test_all_tokens_may_want_one_expert_and_more_than_once(level: str) -> None:
    given = case(300, 3, 3, 20, 30)
    for experts in (torch.full((300, 3), 1), torch.tensor([[0, 2, 0]]).repeat(300, 1)):
        wanted = obvious(given._replace(experts=experts))[1:]
        for found, right in zip(gradients(given._replace(experts=experts), level=level), wanted, strict=True):
            assert apart(found, right) < TOLERANCE[torch.float32]


@ALL_DTYPES
def test_threads_and_repetition_change_no_bit(level: str, dtype: torch.dtype) -> None:
    given, before = case(90, 3, 7, 70, 55, dtype=dtype), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3, 2, 1):
            torch.set_num_threads(threads)
            results.append(gradients(given, level=level))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_what_is_frozen_is_not_computed(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory is asked for, no address given, and what is left is the same bit for bit."""
    given = case(40, 2, 4, 24, 40)
    whole, asked = dict(zip(NAMES, gradients(given), strict=True)), []
    empty = GRADIENTS.empty
    monkeypatch.setattr(
        GRADIENTS, "empty", lambda shape, *, dtype: asked.append(tuple(shape)) or empty(shape, dtype=dtype)
    )
    for learning in (
        ("x",),
        ("weights",),
        ("gate", "up", "down"),
        ("down",),
        ("gate", "x"),
        ("up", "weights"),
    ):
        asked.clear()
        tensors = given.learners()
        for name, tensor in zip(NAMES, tensors, strict=True):
            tensor.requires_grad_(name in learning)
        learn(given, tensors)
        assert len(asked) == len({"gate", "up", "down"} & set(learning))
        for name, tensor in zip(NAMES, tensors, strict=True):
            if name in learning:
                assert tensor.grad is not None
                assert torch.equal(tensor.grad, whole[name]), (learning, name)
            else:
                assert tensor.grad is None


def test_an_expert_without_tokens_has_zeros_in_used_memory(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SMALLEST", 1)
    given = case(20, 2, 6, 24, 40)
    for stack in given[2:5]:
        GRADIENTS.empty(stack.shape, dtype=stack.dtype).fill_(torch.nan)
    for gradient in gradients(given, level=level)[2:]:
        assert not gradient[5].any()
        assert gradient[:5].isfinite().all()
        assert gradient[:5].any()


def test_gradients_take_the_memory_of_those_dropped_and_leave_those_held(
    native: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is the gradient itself, without a copy; a second backward adds to it."""
    monkeypatch.setattr(memory, "SMALLEST", 1)
    GRADIENTS.release()
    given = case(20, 2, 4, 24, 40)
    tensors = given.learners()
    learn(given, tensors)
    gate = tensors[2]
    assert gate.grad is not None
    first, addresses = (
        gate.grad.clone(),
        {tensor.grad.data_ptr() for tensor in tensors[2:] if tensor.grad is not None},
    )
    for tensor in tensors:
        tensor.grad = None
    assert GRADIENTS.waiting() == sum(stack.nbytes for stack in given[2:5])
    learn(given, tensors)
    assert GRADIENTS.waiting() == 0
    assert {tensor.grad.data_ptr() for tensor in tensors[2:]} == addresses
    held, before = gate.grad, gate.grad.clone()
    gate.grad = None
    learn(given._replace(grad=2 * given.grad), tensors)
    assert torch.equal(held, before)
    assert gate.grad.data_ptr() != held.data_ptr()
    assert torch.equal(gate.grad, 2 * first)
    learn(given, tensors)
    assert torch.allclose(gate.grad, 3 * first, rtol=1e-6)


def test_an_infinite_gradient_stays_with_its_token(level: str) -> None:
    given = case(30, 2, 4, 24, 40)
    wanted = gradients(given, level=level)[0]
    given.grad[3] = torch.inf
    found = gradients(given, level=level)[0]
    others = torch.arange(30) != 3
    assert torch.equal(found[others], wanted[others])
    assert not found[3].isfinite().all()


def test_strides_of_inputs_and_gradients(native: Library) -> None:
    given = case(30, 2, 4, 24, 40)
    wanted = gradients(given)
    turned = given._replace(
        x=given.x.T.contiguous().T,
        weights=given.weights.T.contiguous().T,
        experts=given.experts.T.contiguous().T,
        grad=given.grad.T.contiguous().T,
    )
    assert all(torch.equal(*pair) for pair in zip(gradients(turned), wanted, strict=True))
    tensors = given.learners()
    x, weights, gate, up, down = tensors
    learning_experts(x, experts=given.experts, weights=weights, gate=gate, up=up, down=down).sum().backward()
    ones = gradients(given._replace(grad=torch.ones_like(given.grad)))
    assert x.grad is not None
    assert torch.equal(x.grad, ones[0])


def test_no_tokens_and_no_experts_have_gradients_of_zeros(level: str) -> None:
    for n, k in ((0, 2), (5, 0)):
        given = case(5, 2, 4, 8, 12)
        given = given._replace(
            x=given.x[:n], weights=given.weights[:n, :k], experts=given.experts[:n, :k], grad=given.grad[:n]
        )
        for tensor, gradient in zip(given[:5], gradients(given, level=level), strict=True):
            assert gradient.shape == tensor.shape
            assert not gradient.any()


def test_gradients_of_gradients_are_refused(native: Library) -> None:
    given = case(10, 2, 4, 8, 12)
    x, weights, gate, up, down = given.learners()
    y = learning_experts(x, experts=given.experts, weights=weights, gate=gate, up=up, down=down)
    with pytest.raises(SeekVLError, match="no gradients of gradients; set SEEKVL_KERNELS=off"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@ALL_DTYPES
def test_nothing_is_touched_behind_the_buffers(level: str, dtype: torch.dtype) -> None:
    kept: list[tuple[mmap.mmap, int]] = []
    at_the_end = protected(kept)
    for m, d in ((1, 1), (3, 5), (16, 17), (49, 24)):
        n, k, count = 11, 2, 3
        given = case(n, k, count, m, d, dtype=dtype)
        x, weights, gate, up, down, experts, grad = map(at_the_end, given)
        y, between = (
            at_the_end(torch.zeros(n, d, dtype=dtype)),
            at_the_end(torch.zeros(n, k, 2, m, dtype=dtype)),
        )
        start = LEVELS.index(level), 1, DTYPES[dtype]
        common = [tensor.data_ptr() for tensor in (gate, up, down, experts, weights, x)]
        assert library().experts_kept(*start, *common, y.data_ptr(), between.data_ptr(), n, k, d, m) == 0
        found = [at_the_end(torch.full_like(tensor, torch.nan)) for tensor in (gate, up, down, x, weights)]
        addresses = [tensor.data_ptr() for tensor in (between, grad, *found)]
        assert library().experts_backward(*start, *common, *addresses, count, n, k, d, m) == 0
        wanted = dict(zip(NAMES, gradients(given, level=level), strict=True))
        for name, gradient in zip(("gate", "up", "down", "x", "weights"), found, strict=True):
            assert torch.equal(gradient, wanted[name]), name
    unprotect(kept)


Break = Callable[[Case], Case]
BAD: dict[str, tuple[Break, str]] = {
    "an expert too high": (lambda c: c._replace(experts=c.experts + 9), "is none of 4 experts"),
    "experts of 32 bits": (lambda c: c._replace(experts=c.experts.int()), "experts are torch.int32"),
    "weights in half": (lambda c: c._replace(weights=c.weights.half()), "weights are torch.float16"),
    "float64": (lambda c: Case(*(t.double() for t in c[:5]), *c[5:]), "gate is torch.float64"),
    "mixed dtypes": (lambda c: c._replace(x=c.x.bfloat16()), "use one dtype"),
    "another width": (lambda c: c._replace(x=c.x[:, :-1].contiguous()), "cannot be multiplied with gate"),
    "stacks that differ": (
        lambda c: c._replace(up=c.up[:, :-1].contiguous()),
        "not the matrices of the same",
    ),
    "a turned stack": (lambda c: c._replace(down=c.down.mT.contiguous().mT), "down is .* not contiguous"),
    "too few tokens": (lambda c: c._replace(x=c.x[:-1]), "do not fit"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_computed_is_refused(name: str, native: Library) -> None:
    spoil, said = BAD[name]
    with pytest.raises(SeekVLError, match=said):
        gradients(spoil(case(10, 2, 4, 8, 12)))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the size of the process")
def test_no_memory_is_an_error_and_no_end(native: Library) -> None:
    """The panels of 60,000 tokens at one expert take 120 MB, of which there are 16."""
    n, d = 60_000, 64
    x, gate, down = torch.ones(n, d), torch.full((1, d, d), 1 / d), torch.full((1, d, d), 1 / d)
    weights, experts = torch.ones(n, 1, requires_grad=True), torch.zeros(n, 1, dtype=torch.int64)
    y = learning_experts(x, experts=experts, weights=weights, gate=gate, up=gate, down=down)
    torch.ones(1, requires_grad=True).mul(1).backward(torch.ones(1))  # imports what must not fail half-way
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), before[1]))
    try:
        with pytest.raises(MemoryError, match="no memory for the gradients of 60000 tokens at 1"):
            y.backward(x, retain_graph=True)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    y.backward(x)
    assert weights.grad is not None
    assert torch.allclose(weights.grad, d * F.silu(torch.ones(n, 1)))
