"""Attention of a step over the cache in torch, what a GPU's kernel (`gpu.triton_kernels`) is compared with.

No length is asked for on the host: who sees how much stays on the device. So the work can be recorded once
and replayed for any lengths.

Letters: n rows of a step, s columns of the cache, h heads, k key-value heads, g heads that share one, e width
of what stands in the place of keys, w of what stands in that of values.
"""

import torch
from torch import Tensor


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
    """Attend f[n, h, w] to columns 0..columns[i] of row slots[i] of the cache.

    q f[n, h, e], keys f[rows, k, s, e], values f[rows, k, s, w], slots and columns i64[n]. latent_q f[n, h,
    w]: with a latent, what meets the values as a second key.
    """
    n, k = len(q), keys.shape[1]
    k_rows, v_rows = keys[slots], values[slots]  # n k s e, n k s w
    scores = torch.unflatten(q, 1, (k, -1)).float() @ k_rows.mT.float()  # n k g s
    if latent_q is not None:
        scores = scores + torch.unflatten(latent_q, 1, (k, -1)).float() @ v_rows.mT.float()
    seen = torch.arange(keys.shape[2], device=q.device) <= columns[:, None]  # n s
    scores = (scores * scale).masked_fill(~seen.view(n, 1, 1, -1), -torch.inf)
    mixed: Tensor = scores.softmax(dim=-1).to(q.dtype) @ v_rows  # n k g w
    return mixed.flatten(1, 2)
