"""Experts that learn on a CPU: forward and backward of all experts of a layer are one call each.

The forward is that of prompts and keeps what gate and up gave, in the dtype of the inputs: 2 m numbers for
each slot, which is a token at one of its experts. With t the gradient of the output of a token and s the
weight of the expert the backward computes

    hidden numbers   down^T t            gives the gradients of gate's and up's results, and of s
    inputs           gate^T dg + up^T du
    matrices         dg x^T, du x^T, t (s h)^T

Sums run in float32. With bfloat16 on `avx512_bf16` what is multiplied again (dg, du, s h) is rounded to
bfloat16, as torch does, and numbers below 2^-126 count as zero; on other levels nothing is rounded. What is
not asked for is not computed: frozen matrices, inputs that need no gradient. The number of threads changes no
bit.

Letters: n tokens, k experts a token, E experts, m width of an expert, d width.
"""

from typing import Any, cast

import torch
from torch import Tensor

from seekvl.engine.kernels.compiled import SWITCH, library
from seekvl.engine.kernels.memory import GRADIENTS
from seekvl.engine.kernels.products import DTYPES, check_experts, level_index
from seekvl.runtime import SeekVLError


def learning_experts(
    x: Tensor,
    *,
    experts: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    level: str | None = None,
) -> Tensor:
    """Do as `products.swiglu_experts` so that autograd can follow, to x, weights, gate, up and down.

    Threads are those of torch, in the backward those at its time. Gradients are of the dtype of what they
    belong to; those of the stacks lie in memory that is used again when they are dropped
    (`memory.GRADIENTS`).

    Raises SeekVLError and MemoryError as `swiglu_experts` does, the latter also in the backward.
    """
    index = level_index(level)
    check_experts(x, experts, weights, gate=gate, up=up, down=down, learn=True)
    return raw_learning_experts(x, experts, weights, gate=gate, up=up, down=down, level=index)


def raw_learning_experts(
    x: Tensor, experts: Tensor, weights: Tensor, *, gate: Tensor, up: Tensor, down: Tensor, level: int
) -> Tensor:
    """Do as `learning_experts` without looking at the arguments again; level is an index into `LEVELS`."""
    y = LearningExperts.apply(x, weights, gate, up, down, experts, level)  # type: ignore[no-untyped-call]
    return cast(Tensor, y)  # torch leaves it untyped


class LearningExperts(torch.autograd.Function):
    """The two calls, as autograd knows them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        experts: Tensor,
        level: int,
    ) -> Tensor:
        """Return f[n, d]."""
        x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
        (n, k), (_, m, d) = experts.shape, gate.shape
        y, kept = torch.empty_like(x), x.new_empty((n, k, 2, m))
        arguments = (
            level,
            torch.get_num_threads(),
            DTYPES[gate.dtype],
            gate.data_ptr(),
            up.data_ptr(),
            down.data_ptr(),
            experts.data_ptr(),
            weights.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            kept.data_ptr(),
            n,
            k,
            d,
            m,
        )
        if y.numel() > 0 and library().experts_kept(*arguments):
            raise MemoryError(f"no memory to send {n} tokens through {k} experts each")
        ctx.save_for_backward(x, weights, gate, up, down, experts, kept)
        ctx.level = level
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of what `forward` was given, None where nobody asked."""
        if torch.is_grad_enabled():
            raise SeekVLError(
                f"the kernels give no gradients of gradients; set {SWITCH}=off to leave experts to torch"
            )
        x, weights, gate, up, down, experts, kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_x = torch.empty_like(x) if wanted[0] else None
        d_weights = torch.empty_like(weights) if wanted[1] else None
        d_gate, d_up, d_down = (
            GRADIENTS.empty(stack.shape, dtype=stack.dtype) if asked else None
            for stack, asked in zip((gate, up, down), wanted[2:5], strict=True)
        )
        grad = grad.contiguous()
        (n, k), (count, m, d) = experts.shape, gate.shape
        arguments = (
            ctx.level,
            torch.get_num_threads(),
            DTYPES[gate.dtype],
            gate.data_ptr(),
            up.data_ptr(),
            down.data_ptr(),
            experts.data_ptr(),
            weights.data_ptr(),
            x.data_ptr(),
            kept.data_ptr(),
            grad.data_ptr(),
            _address(d_gate),
            _address(d_up),
            _address(d_down),
            _address(d_x),
            _address(d_weights),
            count,
            n,
            k,
            d,
            m,
        )
        if library().experts_backward(*arguments):
            raise MemoryError(f"no memory for the gradients of {n} tokens at {k} experts each")
        return d_x, d_weights, d_gate, d_up, d_down, None, None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
