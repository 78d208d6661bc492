"""Scaled dot-product attention, the one way in for every network that has no positions in its scores.

Letters: b rows, t new tokens, s visible tokens, h heads, k key-value heads, e width of queries and keys, w
width of values.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""New tokens of a causal block: of 64 to 192 the fastest for rows of 384 and 448 tokens."""


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
    token i sees tokens 0..i. scale: 1 / sqrt(e) by default. Heads share key-value heads evenly where those
    are fewer.
    """
    if mask is None and q.shape[1] == k.shape[1] and _learns_on_cpu(q):
        return materialised(q, k, v, causal=causal, scale=scale)
    width, missing = v.shape[-1], q.shape[-1] - v.shape[-1]
    if q.device.type == "cpu" and missing > 0:
        # The fused CPU kernel wants one width for all three; without it the scores are materialised.
        v = F.pad(v, (0, missing))
    x = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
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


def _learns_on_cpu(q: Tensor) -> bool:
    return (
        q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and q.requires_grad
    )


@lru_cache(maxsize=16)
def _causal_bias(tokens: int, dtype: torch.dtype) -> Tensor:
    """Return f[t, t], 0 where a token may look and minus infinity beyond; batches have few lengths."""
    return torch.full((tokens, tokens), -torch.inf, dtype=dtype).triu(diagonal=1)
