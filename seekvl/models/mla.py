"""Multi-head latent attention: all heads read keys and values from one small latent (DeepSeek-V2, 2405.04434,
sec. 2.1), the attention of DeepSeek-VL2 small and base (2412.10302, sec. 2).

    x -- q_proj ----> each head [ query n | rotary query p ]
    x -- kv_a_proj -> [ latent r | rotary key p ]       one for all heads, and all that is cached
    latent -- kv_a_norm -- kv_b_proj -> each head [ key n | value w ]

Prefill *expands* the latent to keys and values of every head. A single new token is *absorbed* instead: the
key half of kv_b_proj moves to the query and the value half to the output, so that the cache is read as it is.

Letters: b rows, t new tokens, s visible tokens, d width, h heads, r latent width, n width of a head without
position, p rotary width, w value width of a head.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from seekvl.models.attention import attend
from seekvl.models.llama import LayerCache, RmsNorm, rotate
from seekvl.runtime import SeekVLError, check_positive

NORM_EPS = 1e-6
"""Epsilon of the norm of the latent; the published weights need this one whatever the config says of the
others (golden README, sec. 5).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaConfig:
    """Widths of the attention; published are 512, 128, 64 and 128."""

    kv_rank: int
    """Channels r of the latent."""
    nope_width: int
    """Channels n of a head's query and key without position."""
    rope_width: int
    """Channels p of a head's query, and of the key shared by all heads, that carry the position."""
    value_width: int
    """Channels w of a head's value."""

    def __post_init__(self) -> None:
        check_positive("MLA", self)
        if self.rope_width % 2:
            raise SeekVLError(f"MLA rope_width {self.rope_width} is odd; rotary positions need an even width")

    @property
    def query_width(self) -> int:
        """Channels n + p of a head's query."""
        return self.nope_width + self.rope_width


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x[b, h, t, p] by its positions, pairing channel 2i with 2i + 1; the even channels come out first.

    The published weights pair neighbours here, while `llama.rotate` pairs i with i + p/2. Queries and keys
    leave in the same order, so scores are what they would be in the order they came.
    """
    return rotate(rearrange(x, "b h t (i two) -> b h t (two i)", two=2), cos, sin)


class Mla(nn.Module):
    """Causal attention through the latent."""

    def __init__(self, width: int, *, heads: int, config: MlaConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.scale: float = config.query_width**-0.5
        self.q_proj = nn.Linear(width, heads * config.query_width, bias=False)
        self.kv_a_proj = nn.Linear(width, config.kv_rank + config.rope_width, bias=False)
        self.kv_a_norm = RmsNorm(config.kv_rank, eps=NORM_EPS)
        self.kv_b_proj = nn.Linear(
            config.kv_rank, heads * (config.nope_width + config.value_width), bias=False
        )
        self.o_proj = nn.Linear(heads * config.value_width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None,
        layer: int,
    ) -> Tensor:
        """Mix x[b, t, d] over the visible tokens; see `DeepseekV2.forward`."""
        q, q_rope, k_rope, latent = self.project(x, table=table)
        if cache is not None:
            k_rope, latent = cache.update(layer, k_rope, latent)  # b 1 s p, b 1 s r
        attend = self.absorbed if x.shape[1] == 1 else self.expanded
        out = attend(q, q_rope, k_rope=k_rope, latent=latent, mask=mask)  # b h t w
        mixed: Tensor = self.o_proj(rearrange(out, "b h t w -> b t (h w)"))  # b t d
        return mixed

    def project(self, x: Tensor, *, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries f[b, h, t, n] without and f[b, h, t, p] with position, and of x[b, t, d] what is
        cached: rotary key f[b, 1, t, p] and latent f[b, 1, t, r].
        """
        config = self.config
        q = rearrange(self.q_proj(x), "b t (h e) -> b h t e", h=self.heads)
        q, q_rope = torch.split(q, [config.nope_width, config.rope_width], dim=-1)  # b h t n, b h t p
        kv = self.kv_a_proj(x).unsqueeze(1)  # b 1 t (r p)
        latent, k_rope = torch.split(kv, [config.kv_rank, config.rope_width], dim=-1)  # b 1 t r, b 1 t p
        return q, rotate_pairs(q_rope, *table), rotate_pairs(k_rope, *table), self.kv_a_norm(latent)

    def expanded(
        self, q: Tensor, q_rope: Tensor, *, k_rope: Tensor, latent: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend f[b, h, t, w] with keys and values of every head; a mask of None is plain causal."""
        config = self.config
        kv = rearrange(self.kv_b_proj(latent), "b 1 s (h e) -> b h s e", h=self.heads)
        k, v = torch.split(kv, [config.nope_width, config.value_width], dim=-1)  # b h s n, b h s w
        q = torch.cat((q, q_rope), dim=-1)  # b h t n+p
        k = torch.cat((k, k_rope.expand(-1, self.heads, -1, -1)), dim=-1)  # b h s n+p
        causal = mask is None and q.shape[2] > 1
        return attend(q, k, v, mask=mask, causal=causal, scale=self.scale)  # b h t w

    def absorbed(
        self, q: Tensor, q_rope: Tensor, *, k_rope: Tensor, latent: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend f[b, h, t, w] in the space of the latent; a mask of None sees everything."""
        (b, h, t, _), (for_k, for_v) = q.shape, self.halves()
        k_rope, latent = k_rope.squeeze(1), latent.squeeze(1)  # b s p, b s r
        q = torch.einsum("bhtn,hnr->bhtr", q, for_k)
        scores = q.flatten(1, 2) @ latent.mT + q_rope.flatten(1, 2) @ k_rope.mT  # b (h t) s
        scores = scores.view(b, h, t, -1).float() * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        shares = scores.softmax(dim=-1).to(latent.dtype)  # b h t s
        mixed = (shares.flatten(1, 2) @ latent).view(b, h, t, -1)  # b h t r
        return torch.einsum("bhtr,hwr->bhtw", mixed, for_v)

    def halves(self) -> tuple[Tensor, Tensor]:
        """Return what makes keys f[h, n, r] and what makes values f[h, w, r] of a latent."""
        weight = rearrange(self.kv_b_proj.weight, "(h e) r -> h e r", h=self.heads)
        for_k, for_v = torch.split(weight, [self.config.nope_width, self.config.value_width], dim=1)
        return for_k, for_v
