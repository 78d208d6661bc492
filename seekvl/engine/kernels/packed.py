"""Products with quantised matrices on the CPU, for any number of rows: decoding and prompts alike.

The matrices are those of `models.quantized`, read where they lie. With few rows memory is the limit and a
matrix is read once; with many rows each weight that was loaded meets many of them. Whole numbers are summed
exactly within a group of inputs, groups in float32 from the first to the last, and rounded once: a row among
others equals the row alone, bit for bit, however many threads there are.

Letters: b rows of x, o rows of the matrix, i numbers of a row, T tiles, S bytes of a tile, n tokens, k
experts a token, E experts, m width of an expert, d width.
"""

import torch
from torch import Tensor

from seekvl.engine.kernels.compiled import library
from seekvl.engine.kernels.products import DTYPES, check_routing, level_index, thread_count
from seekvl.models.quantized import Kind, packed_shape
from seekvl.runtime import SeekVLError

NUMBERS: dict[Kind, int] = {"int8": 3, "int4": 4}
"""What the library knows the kinds by, beside those of `products.DTYPES`."""


def packed_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Kind,
    rows: int,
    level: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """Return f[..., o] = x[..., i] W[o, i]^T + bias[o] in the dtype of x, for W packed as u8[T, S].

    rows: o, which the tiles do not tell. level: one of `library().levels`, None as `choose_level` says.
    threads: None takes those of torch.

    Raises SeekVLError for memory that the kernels cannot read, and for shapes that do not fit each other.
    """
    index = level_index(level)
    _check_x(x)
    _check_packed(packed, "packed", kind=kind, shape=packed_shape(kind, rows, x.shape[-1]))
    if bias is not None and (
        bias.shape != (rows,) or bias.dtype != x.dtype or not bias.is_cpu or not bias.is_contiguous()
    ):
        raise SeekVLError(
            f"bias {bias.dtype} {list(bias.shape)} on {bias.device} does not fit {rows} rows in {x.dtype}"
        )
    return raw_packed_linear(
        x, packed, bias, kind=kind, rows=rows, level=index, threads=thread_count(threads)
    )


def packed_experts(
    x: Tensor,
    *,
    experts: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    kind: Kind,
    width: int,
    level: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """Return f[n, d]: what experts i64[n, k] make of x[n, d], summed by weights f32[n, k].

    gate and up are u8[E, T, S] of matrices [m, d], down of matrices [d, m]; m is `width`. Hidden numbers stay
    in float32 until they are rounded as inputs of `down`. level and threads are those of `packed_linear`.

    Raises SeekVLError as `packed_linear` does, and for an expert outside of 0..E-1.
    """
    index = level_index(level)
    _check_x(x)
    check_routing(x, experts, weights, count=len(gate))
    count, channels = len(gate), x.shape[1]
    wide, narrow = packed_shape(kind, width, channels), packed_shape(kind, channels, width)
    for name, stack, shape in (("gate", gate, wide), ("up", up, wide), ("down", down, narrow)):
        _check_packed(stack, name, kind=kind, shape=(count, *shape))
    return raw_packed_experts(
        x,
        experts,
        weights,
        gate=gate,
        up=up,
        down=down,
        kind=kind,
        width=width,
        level=index,
        threads=thread_count(threads),
    )


def raw_packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, *, kind: Kind, rows: int, level: int, threads: int
) -> Tensor:
    """Do as `packed_linear` without looking at the arguments again; level is an index into `LEVELS`."""
    x = x.contiguous()
    width = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    library().packed_linear(
        level,
        threads,
        NUMBERS[kind],
        DTYPES[x.dtype],
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        y.numel() // rows,
        rows,
        width,
    )
    return y


def raw_packed_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    *,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    kind: Kind,
    width: int,
    level: int,
    threads: int,
) -> Tensor:
    """Do as `packed_experts` without looking at the arguments again; level is an index into `LEVELS`."""
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    n, k = experts.shape
    library().packed_experts(
        level,
        threads,
        NUMBERS[kind],
        DTYPES[x.dtype],
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
        width,
    )
    return y


def _check_x(x: Tensor) -> None:
    """Refuse an input that the kernels cannot take."""
    if not x.is_cpu or x.dtype not in DTYPES:
        raise SeekVLError(
            f"x is {x.dtype} on {x.device}; the kernels take {', '.join(map(str, DTYPES))} on the CPU"
        )
    if x.dim() < 1 or x.shape[-1] < 1:
        raise SeekVLError(f"x {list(x.shape)} has no numbers to multiply")
    if x.requires_grad and torch.is_grad_enabled():
        raise SeekVLError("x needs a gradient, which the kernels do not give; use torch.no_grad()")


def _check_packed(packed: Tensor, name: str, *, kind: Kind, shape: tuple[int, ...]) -> None:
    """Refuse what is no packed matrix, or stack of them, of this shape."""
    if packed.dtype != torch.uint8 or not packed.is_cpu or not packed.is_contiguous():
        raise SeekVLError(
            f"{name} is {packed.dtype} on {packed.device}; a packed matrix is contiguous uint8 on the CPU"
        )
    if packed.shape != shape:
        raise SeekVLError(f"{name} is {list(packed.shape)}; in {kind} it must be {list(shape)} here")
