"""Scaled dot-product attention, the one way in for every network that has no positions in its scores.

Letters: b rows, t new tokens, s visible tokens, h heads, k key-value heads, e width of queries and keys, w
width of values, g heads of all rows, one after the other.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""New tokens of a causal block: of 64 to 192 the fastest for rows of 384 and 448 tokens."""

CPU_SCORES, OTHER_SCORES = 2**21, 2**26
"""Scores in memory at once, of a CPU, which wants them in its cache, and of any other device."""

Bias = Callable[[slice, slice], Tensor]
"""Returns what is added to the scores of these heads and queries: f[g', t', s], new in memory."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale q k^T) v, f[b, h, t, w], of q[b, h, t, e], k[b, k, s, e] and v[b, k, s, w].

    mask: bool, broadcast to [b, h, t, s], True where a new token may look. causal: in the place of a mask,
    the new tokens are the last of those visible, and each sees those before it and itself. scale: 1 / sqrt(e)
    by default. Heads share key-value heads evenly where those are fewer.
    """
    (t, s), on_cpu = (q.shape[2], k.shape[2]), q.device.type == "cpu"
    if mask is None and q.shape[1] == k.shape[1] and _learns_on_cpu(q):
        return materialised(q, k, v, causal=causal, scale=scale)
    if mask is None and not causal and q.shape == k.shape and q.shape[2] > 1 and _is_half_on_cpu(q):
        x = attend_in_blocks(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale=scale)  # (b h) t w
        return torch.unflatten(x, 0, q.shape[:2])
    width, missing = v.shape[-1], q.shape[-1] - v.shape[-1]
    if missing > 0 and (on_cpu or mask is None):
        # Fused kernels want one width for all three: without it a CPU materialises the scores, and CUDA's
        # flash attention, which knows no mask either, leaves the work to a slower kernel.
        v = F.pad(v, (0, missing))
    if causal and t < s:
        mask = _last_rows(t, s) if on_cpu else _last_rows_unwritten(t, s)
    x = F.scaled_dot_product_attention(
        *(q, k, v),
        attn_mask=mask,
        is_causal=causal and t == s,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return x[..., :width]  # b h t w


def materialised(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> Tensor:
    """Do as `attend` with the scores in memory, kept for the backward.

    Causal, it goes by blocks of new tokens, which leave out most of what nobody sees:

        x x . . . .    block of tokens 0, 1
        x x . . . .
        x x x x . .    block of tokens 2, 3
        x x x x . .

    What a CPU learns with in bfloat16: with the backward of its fused kernel an attention takes 2.4 times as
    long (16 rows of 384 tokens, 6 heads of 48), and 5 times over the 100 patches of a tile.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    (b, h, t, _), s = q.shape, k.shape[2]
    rows, keys, values = (x.flatten(0, 1) for x in (q, k, v))  # (b h) t e, (b h) s e, (b h) s w
    blocks = []
    for start in range(0, t, BLOCK if causal else t):
        end, seen = (min(start + BLOCK, t),) * 2 if causal else (t, s)
        bias = _causal_bias(t, q.dtype)[start:end, :seen] if causal else q.new_zeros(())
        scores = torch.baddbmm(bias, rows[:, start:end], keys[:, :seen].mT, alpha=scale)
        blocks.append(scores.softmax(dim=-1).to(v.dtype) @ values[:, :seen])
    return torch.unflatten(torch.cat(blocks, dim=1), 0, (b, h))  # b h t w


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Bias | None = None, scale: float | None = None
) -> Tensor:
    """Return softmax(scale q k^T + bias) v, f[g, t, w], of q[g, t, e], k[g, s, e] and v[g, s, w].

    Everyone sees everyone, some heads and queries at a time, so that neither scores nor bias are ever in
    memory as a whole. A block holds several heads, and of heads with many tokens only parts:

        head 0   a a a a      head 0   a a b b      a, b, ... are computed together
        head 1   a a a a      head 1   a a b b
        head 2   b b b b      head 2   c c d d

    Learning takes one block: it keeps all scores anyway, and gradients of keys would be rounded with each
    block. In bfloat16 a CPU takes products and softmax one by one, which is twice as fast as its fused kernel
    (docs/performance.md, vision towers).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    (g, t, _), s = q.shape, k.shape[1]
    limit = CPU_SCORES if q.device.type == "cpu" else OTHER_SCORES
    if torch.is_grad_enabled() and q.requires_grad:
        limit = 2 * g * t * s
    tokens = min(t, max(1, limit // (2 * s)))
    heads = min(g, max(1, limit // (tokens * s)))
    rows = []
    for head in range(0, g, heads):
        these = slice(head, head + heads)
        keys, values = k[these], v[these]  # g' s e, g' s w
        if _is_half_on_cpu(q):  # every product would copy what lies otherwise
            keys, values = keys.mT.contiguous().mT, values.contiguous()
        blocks = []
        for token in range(0, t, tokens):
            now = slice(token, token + tokens)
            added = None if bias is None else bias(these, now)  # g' t' s
            blocks.append(_attend_block(q[these, now], keys, values, bias=added, scale=scale))
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, scale: float) -> Tensor:
    """Return f[g, t, w] at once; the memory of the bias may be used for the scores."""
    if not _is_half_on_cpu(q):
        mask = None if bias is None else bias[None]
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
    if bias is None:
        scores = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=scale)
    else:
        scores = bias.baddbmm_(q, k.mT, alpha=scale)
    return scores.softmax(dim=-1).to(v.dtype) @ v  # autocast leaves a softmax in float32


def _is_half_on_cpu(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def _learns_on_cpu(q: Tensor) -> bool:
    return _is_half_on_cpu(q) and torch.is_grad_enabled() and q.requires_grad


@lru_cache(maxsize=2)
def _last_rows(tokens: int, seen: int) -> Tensor:
    """Return who may see whom, bool[t, s], where the new tokens are the last: all layers ask for the same.

    2 tokens were there, 3 are new    x x x . .
                                      x x x x .
                                      x x x x x
    """
    with torch.inference_mode(mode=False):  # it is kept, and may be met by a gradient
        return torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)


def _last_rows_unwritten(tokens: int, seen: int) -> Tensor:
    """Return the same as a mask that is never written out: CUDA's flash kernel takes no other."""
    from torch.nn.attention.bias import (
        causal_lower_right,
    )  # with torch's compiler: seconds, on a CPU for naught

    return causal_lower_right(tokens, seen)


@lru_cache(maxsize=16)
def _causal_bias(tokens: int, dtype: torch.dtype) -> Tensor:
    """Return f[t, t], 0 where a token may look and minus infinity beyond; batches have few lengths."""
    return torch.full((tokens, tokens), -torch.inf, dtype=dtype).triu(diagonal=1)
