"""Products on the CPU: of a few rows at a time, which decoding consists of, and of many, as a prompt has.

They read torch's own memory: there is no second copy of the weights, and nothing to prepare. Sums run in
float32, which is exact for the products of half precision, and are rounded once, to nearest even. With
s = sum |x W| of an element the error of a sum over i numbers is at most

    (i + 1) * 2^-24 * s   in float32, and half a unit of the last place of bfloat16 or float16 more

A level that multiplies pairs of bfloat16 (`avx512_bf16`) takes numbers below 2^-126 for zero.

Up to `MAX_ROWS` rows stream the weights, more go in blocks that reuse them from cache; the two sum up in
another order. Within each a row equals the row computed among any others, bit for bit.

Letters: b rows of x, o rows of the weight, i numbers of a row, n tokens, k experts a token, E experts, m
width of an expert, d width.
"""

import torch
from torch import Tensor

from seekvl.engine.kernels.compiled import LEVELS, choose_level, library
from seekvl.runtime import SeekVLError

MAX_ROWS = 8
"""Most rows of x that stream the weights; beyond, reusing them from cache is better."""

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""What weights may be, with the number kernels.cpp knows it by."""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    level: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """Return f[..., o] = x[..., i] W[o, i]^T + bias[o], in the dtype of x: that of the weight, or float32.

    level: one of `library().levels`, None as `choose_level` says. threads: None takes those of torch.

    Raises SeekVLError for tensors that are not contiguous on the CPU, that do not fit each other, or that
    need a gradient; MemoryError where none is left.
    """
    index = level_index(level)
    _check_memory(weight, "weight")
    _check_width(x, weight, "weight", axes=2)
    if x.dtype not in (weight.dtype, torch.float32):
        raise SeekVLError(f"x is {x.dtype}; with a weight in {weight.dtype} it must be that or float32")
    if bias is not None:
        _check_memory(bias, "bias")
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise SeekVLError(
                f"bias {bias.dtype} {list(bias.shape)} does not fit weight {weight.dtype} "
                f"{list(weight.shape)}"
            )
    return raw_linear(x, weight, bias, level=index, threads=thread_count(threads))


def swiglu_experts(
    x: Tensor,
    *,
    experts: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    level: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """Return f[n, d]: what experts i64[n, k] make of x[n, d], summed by weights f32[n, k].

    gate and up are [E, m, d], down is [E, d, m]; the k experts of a token need not differ. Hidden numbers
    stay in float32; `avx512_bf16` rounds those of bfloat16, as torch does. level and threads are those of
    `linear`.

    Raises SeekVLError and MemoryError as `linear` does, and for an expert outside of 0..E-1.
    """
    index = level_index(level)
    check_experts(x, experts, weights, gate=gate, up=up, down=down, learn=False)
    return raw_experts(
        x, experts, weights, gate=gate, up=up, down=down, level=index, threads=thread_count(threads)
    )


def check_experts(
    x: Tensor, experts: Tensor, weights: Tensor, *, gate: Tensor, up: Tensor, down: Tensor, learn: bool
) -> None:
    """Refuse what `swiglu_experts` cannot compute; `learn`: gradients may be asked for."""
    for name, stack in (("gate", gate), ("up", up), ("down", down)):
        _check_memory(stack, name, learn=learn)
    _check_width(x, gate, "gate", axes=3, learn=learn)
    count, width, channels = gate.shape
    if up.shape != gate.shape or down.shape != (count, channels, width):
        raise SeekVLError(
            f"gate {list(gate.shape)}, up {list(up.shape)} and down {list(down.shape)} are not the matrices "
            "of the same experts"
        )
    if {x.dtype, up.dtype, down.dtype} != {gate.dtype}:
        raise SeekVLError(
            f"x is {x.dtype}, gate {gate.dtype}, up {up.dtype}, down {down.dtype}; use one dtype"
        )
    check_routing(x, experts, weights, count=count)


def check_routing(x: Tensor, experts: Tensor, weights: Tensor, *, count: int) -> None:
    """Refuse what does not send tokens x[n, d] to experts i64[n, k], of `count`, with weights f32[n, k]."""
    if x.dim() != 2 or experts.shape != weights.shape or experts.shape[:-1] != x.shape[:1]:
        raise SeekVLError(
            f"x {list(x.shape)}, experts {list(experts.shape)} and weights {list(weights.shape)} do not fit "
            "[n, d], [n, k], [n, k]"
        )
    for name, found, wanted in (("experts", experts, torch.int64), ("weights", weights, torch.float32)):
        if found.dtype != wanted or not found.is_cpu:
            raise SeekVLError(f"{name} are {found.dtype} on {found.device}, not {wanted} on the CPU")
    if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < count:
        raise SeekVLError(f"expert {int(experts.min())} or {int(experts.max())} is none of {count} experts")


def raw_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, level: int, threads: int) -> Tensor:
    """Do as `linear` without looking at the arguments again; level is an index into `LEVELS`."""
    x = x.contiguous()
    o, i = weight.shape
    y = x.new_empty((*x.shape[:-1], o))
    if y.numel() == 0:
        return y
    rows = y.numel() // o
    arguments = (
        level,
        threads,
        DTYPES[weight.dtype],
        DTYPES[x.dtype],
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        rows,
        o,
        i,
    )
    if rows <= MAX_ROWS:
        library().linear(*arguments)
    elif library().linear_many(*arguments):
        raise MemoryError(f"no memory to multiply {rows} rows with a matrix [{o}, {i}]")
    return y


def raw_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    *,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    level: int,
    threads: int,
) -> Tensor:
    """Do as `swiglu_experts` without looking at the arguments again; level is an index into `LEVELS`."""
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    n, k = experts.shape
    arguments = (
        level,
        threads,
        DTYPES[gate.dtype],
        gate.data_ptr(),
        up.data_ptr(),
        down.data_ptr(),
        experts.data_ptr(),
        weights.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        n,
        k,
        x.shape[1],
        gate.shape[1],
    )
    if n <= MAX_ROWS:
        library().experts(*arguments)
    elif library().experts_many(*arguments):
        raise MemoryError(f"no memory to send {n} tokens through {k} experts each")
    return y


def level_index(name: str | None) -> int:
    """Return the number of a level; None takes the one that answers are computed on."""
    level = choose_level(name)
    if level is None:
        library()
        raise SeekVLError("the kernels are switched off; name a level to use them all the same")
    return LEVELS.index(level)


def thread_count(wish: int | None) -> int:
    """Return how many threads compute."""
    if wish is not None and wish < 1:
        raise SeekVLError(f"threads must be at least 1, not {wish}")
    return torch.get_num_threads() if wish is None else wish


def _check_memory(tensor: Tensor, name: str, *, learn: bool = False) -> None:
    """Refuse what the kernels cannot read as plain memory."""
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.dtype not in DTYPES:
        kind = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise SeekVLError(
            f"{name} is {tensor.dtype} on {tensor.device} and {kind}; the kernels take contiguous "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)} on the CPU"
        )
    if tensor.requires_grad and torch.is_grad_enabled() and not learn:
        raise SeekVLError(f"{name} needs a gradient, which the kernels do not give; use torch.no_grad()")


def _check_width(x: Tensor, weight: Tensor, name: str, *, axes: int, learn: bool = False) -> None:
    """Refuse rows that do not meet the matrix."""
    if weight.dim() != axes or x.dim() < 1 or x.shape[-1] != weight.shape[-1]:
        raise SeekVLError(f"x {list(x.shape)} cannot be multiplied with {name} {list(weight.shape)}")
    if not x.is_cpu:
        raise SeekVLError(f"x is on {x.device}; the kernels compute on the CPU")
    if x.requires_grad and torch.is_grad_enabled() and not learn:
        raise SeekVLError("x needs a gradient, which the kernels do not give; use torch.no_grad()")
