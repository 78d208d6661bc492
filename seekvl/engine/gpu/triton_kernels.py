"""The two Triton kernels of a step, each with what launches it: attention over the cache, as `gpu.kernels`
says it, and experts that a few tokens read where they lie.

Annotations of kernels are strings, for Triton takes any other name in them for a variable.

Letters as there; p parts that the columns of a row are cut into, z slots (n * experts a token), d width of a
token, m width of an expert.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
"""Columns of the cache that a program of the attention takes at once."""
MOST_PARTS = 32
"""Parts that the columns of a row may be cut into, so that few rows keep all multiprocessors busy."""
ROWS, INPUTS = 8, 256
"""Rows of an expert's matrix that a program takes, and inputs at once."""


@triton.jit
def _attend(
    q: "Any", latent_q: "Any", keys: "Any", values: "Any",
    slots: "Any", columns: "Any", out: "Any", sums: "Any", scale: "Any", shared: "Any", parts: "Any",
    slot_keys: "Any", head_keys: "Any", slot_values: "Any", head_values: "Any",
    E: tl.constexpr, W: tl.constexpr, LATENT: tl.constexpr, PRECISION: tl.constexpr,
    E_WIDE: tl.constexpr, W_WIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Attend to one part of the columns of one row, with the heads that share a key-value head."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, e, w = tl.arange(0, GROUP), tl.arange(0, E_WIDE), tl.arange(0, W_WIDE)
    slot, length = tl.load(slots + row), tl.load(columns + row) + 1
    each = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    first = part * each
    last = tl.minimum(first + each, length)
    lines = (row * tl.num_programs(1) + head) * shared + g
    here, in_e, in_w = (g < shared)[:, None], (e < E)[None, :], (w < W)[None, :]
    query = tl.load(q + lines[:, None] * E + e[None, :], mask=here & in_e, other=0.0)
    if LATENT:
        second = tl.load(latent_q + lines[:, None] * W + w[None, :], mask=here & in_w, other=0.0)
    most = tl.full((GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    mixed = tl.zeros((GROUP, W_WIDE), tl.float32)
    keys += slot * slot_keys + head * head_keys
    values += slot * slot_values + head * head_values
    for begin in range(first, last, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        seen = column < last
        k = tl.load(keys + column[:, None] * E + e[None, :], mask=seen[:, None] & in_e, other=0.0)
        v = tl.load(values + column[:, None] * W + w[None, :], mask=seen[:, None] & in_w, other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        if LATENT:
            scores += tl.dot(second, tl.trans(v), input_precision=PRECISION)
        scores = tl.where(seen[None, :], scores * scale, -float("inf"))
        peak = tl.maximum(most, tl.max(scores, 1))
        shares, kept = tl.exp(scores - peak[:, None]), tl.exp(most - peak)
        total = total * kept + tl.sum(shares, 1)
        mixed = mixed * kept[:, None] + tl.dot(shares.to(v.dtype), v, input_precision=PRECISION)
        most = peak
    at = lines * parts + part
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]  # a part without columns has nothing
    tl.store(out + at[:, None] * W + w[None, :], mixed, mask=here & in_w)
    tl.store(sums + at, most + tl.log(total), mask=g < shared)


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    slots: Tensor,
    columns: Tensor,
    scale: float,
    latent_q: Tensor | None = None,
) -> Tensor:
    """Do as `kernels.attend_rows`: columns in parts at the same time, merged by their sums."""
    assert slots.is_contiguous()
    assert columns.is_contiguous()
    (n, h, e), k, w = q.shape, keys.shape[1], values.shape[3]
    parts = max(1, min(MOST_PARTS, 2 * _multiprocessors(q.device) // (n * k)))
    out = torch.empty(n, h, parts, w, dtype=torch.float32, device=q.device)
    sums = torch.empty(n, h, parts, dtype=torch.float32, device=q.device)
    q = q.contiguous()
    latent_q = None if latent_q is None else latent_q.contiguous()
    _attend[(n, k, parts)](
        q, q if latent_q is None else latent_q, keys, values, slots, columns, out, sums,
        scale, h // k, parts, keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        E=e, W=w, LATENT=latent_q is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        E_WIDE=max(16, triton.next_power_of_2(e)), W_WIDE=max(16, triton.next_power_of_2(w)),
        GROUP=max(16, triton.next_power_of_2(h // k)), BLOCK=BLOCK, num_stages=2,
    )  # fmt: skip
    share = sums.softmax(dim=-1).unsqueeze(-1)  # n h p 1
    return (out * share).sum(dim=2).to(q.dtype)


@triton.jit
def _multiply(
    x: "Any", first: "Any", second: "Any", experts: "Any", out: "Any",
    inputs: "Any", outputs: "Any", per_row: "Any",
    GATED: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply some rows of the matrix of one slot's expert; gated, silu of the first times the second."""
    slot, block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(experts + slot)
    o = block * ROWS + tl.arange(0, ROWS)
    lines = expert * outputs * inputs + o[:, None].to(tl.int64) * inputs
    left, right = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for begin in range(0, inputs, INPUTS):
        i = begin + tl.arange(0, INPUTS)
        there = (o < outputs)[:, None] & (i < inputs)[None, :]
        row = tl.load(x + (slot // per_row) * inputs + i, mask=i < inputs, other=0.0).to(tl.float32)
        weight = tl.load(first + lines + i[None, :], mask=there, other=0.0).to(tl.float32)
        left += tl.sum(weight * row[None, :], 1)
        if GATED:
            weight = tl.load(second + lines + i[None, :], mask=there, other=0.0).to(tl.float32)
            right += tl.sum(weight * row[None, :], 1)
    if GATED:
        left = left / (1.0 + tl.exp(-left)) * right
    tl.store(out + slot * outputs + o, left, mask=o < outputs)


def slot_experts(x: Tensor, experts: Tensor, *, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return f[n, k, d]: what experts i64[n, k] make of x[n, d]; every slot reads its expert's matrices."""
    slots, m, d = experts.numel(), gate.shape[1], x.shape[1]
    x, experts = x.contiguous(), experts.contiguous()
    hidden = torch.empty(slots, m, dtype=x.dtype, device=x.device)
    out = torch.empty(*experts.shape, d, dtype=x.dtype, device=x.device)
    sizes = {"ROWS": ROWS, "INPUTS": INPUTS}
    _multiply[(slots, triton.cdiv(m, ROWS))](
        x, gate, up, experts, hidden, d, m, experts.shape[1], GATED=True, **sizes
    )
    _multiply[(slots, triton.cdiv(d, ROWS))](hidden, down, down, experts, out, m, d, 1, GATED=False, **sizes)
    return out


@cache
def _multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; the interpreter, on a CPU, has two."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
