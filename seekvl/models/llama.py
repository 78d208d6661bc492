"""LLaMA decoder: the language model of DeepSeek-VL (DeepSeek LLM, 2401.02954, sec. 2.2; 2403.05525, sec.
3.1).

Positions, mask and cache are arguments of the forward: packing, batching, chunked prefill and decoding are
the same network, fed differently.

Letters: b rows, t new tokens, s visible tokens, d width, h heads, k key-value heads, e width of a head, v
vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seekvl.models.attention import attend
from seekvl.runtime import SeekVLError, check_positive


def check_heads(name: str, *, width: int, heads: int, kv_heads: int) -> None:
    """Raise SeekVLError for heads that plain attention cannot have; `name` says whose they are."""
    if width % heads:
        raise SeekVLError(f"{name} width {width} is not divisible by its {heads} heads")
    if heads % kv_heads:
        raise SeekVLError(f"{name}: {heads} heads cannot share {kv_heads} key-value heads evenly")
    if width // heads % 2:
        raise SeekVLError(f"{name} heads are {width // heads} wide; rotary positions need an even width")


CacheShape = tuple[tuple[int, int], tuple[int, int]]
"""(heads, width) of what stands in the place of the keys, and of what stands in that of the values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """Dimensions of the decoder. Embedding and head are two matrices: the published weights are untied."""

    vocab_size: int
    """Rows of embedding and head; the published files have more rows than the tokenizer has entries."""
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    """Hidden channels of the SwiGLU."""
    max_positions: int = 16384
    """Longest sequence, tokens; rotary positions are not scaled."""
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_positive("LLaMA", self)
        check_heads("LLaMA", width=self.width, heads=self.heads, kv_heads=self.kv_heads)

    @property
    def head_width(self) -> int:
        """Channels e of one head."""
        return self.width // self.heads

    @property
    def cache_shape(self) -> CacheShape:
        """What a layer caches of one token: keys and values of each key-value head."""
        return (self.kv_heads, self.head_width), (self.kv_heads, self.head_width)


class LayerCache(Protocol):
    """Where a layer puts the keys and values of new tokens and finds those of all visible ones."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store f[b, k, t, e] of the new tokens; return f[b, k, s, e] of every visible token, the new ones
        last. The two may differ in k and e, see `cache_shape` of the config.
        """
        ...


def packed_mask(documents: Tensor) -> Tensor:
    """Return who may see whom, bool[b, 1, t, t], when rows hold several documents i64[b, t].

    A token sees itself and what stands before it in its own document:

        documents  0 0 1 1      x . . .
                                x x . .
                                . . x .
                                . . x x
    """
    same = documents[:, :, None] == documents[:, None, :]
    return torch.tril(same).unsqueeze(1)


def rotary_table(positions: Tensor, *, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, float32[b, 1, t, e/2], of rotary positions i64[b, t].

    Made afresh in float32 on every forward and never kept in the module, so that no cast of the weights can
    reach it: in bfloat16 positions above 256 would already collide.
    """
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angle = (positions[..., None].float() / theta**exponent).unsqueeze(1)  # b 1 t e/2
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x[b, h, t, e] by its positions, pairing channel i with channel i + e/2; computed in float32."""
    first, second = x.float().chunk(2, dim=-1)  # b h t e/2
    left = torch.addcmul(first * cos, second, sin, value=-1)
    right = torch.addcmul(second * cos, first, sin)
    return torch.cat((left, right), dim=-1).to(x.dtype)


class RmsNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x[..., d] over its channels; like the reference it rounds before the weight."""
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.eps)


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width: int, *, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        kv_width = kv_heads * (width // heads)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None,
        layer: int,
    ) -> Tensor:
        """Mix x[b, t, d] over the visible tokens; see `Llama.forward`."""
        q, k, v = self.project(x, table=table)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # b k s e
        x = attend(q, k, v, mask=mask, causal=mask is None and q.shape[2] > 1)  # b h t e
        out: Tensor = self.o_proj(rearrange(x, "b h t e -> b t (h e)"))  # b t d
        return out

    def project(self, x: Tensor, *, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries f[b, h, t, e], rotated keys and values f[b, k, t, e] of x[b, t, d]."""
        q = rearrange(self.q_proj(x), "b t (h e) -> b h t e", h=self.heads)
        k = rearrange(self.k_proj(x), "b t (k e) -> b k t e", k=self.kv_heads)
        v = rearrange(self.v_proj(x), "b t (k e) -> b k t e", k=self.kv_heads)
        return rotate(q, *table), rotate(k, *table), v


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_width, bias=False)
        self.up_proj = nn.Linear(width, mlp_width, bias=False)
        self.down_proj = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of x[..., d] alone."""
        gate = self.gate_proj(x)
        if torch.is_grad_enabled():
            gate = F.silu(gate) * self.up_proj(x)
        else:  # the same numbers in the same buffer: fresh memory for each is 1/20 of a prefill on the CPU
            gate = F.silu(gate, inplace=True).mul_(self.up_proj(x))
        out: Tensor = self.down_proj(gate)
        return out


class Layer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = RmsNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, heads=config.heads, kv_heads=config.kv_heads)
        self.mlp_norm = RmsNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(
        self,
        x: Tensor,
        *,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None,
        layer: int,
    ) -> Tensor:
        """Apply attention and SwiGLU to x[b, t, d], each added to the stream."""
        x = x + self.attn(self.attn_norm(x), table=table, mask=mask, cache=cache, layer=layer)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Llama(nn.Module):
    """The decoder between embedding and head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RmsNorm(config.width, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(
        self,
        embeds: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Turn embeddings f[b, t, d] into hidden states f[b, t, d] after the final norm.

        positions: i64[b, t], 0.. when None. mask: bool[b or 1, 1, t, s], True where a new token may look;
        None means plain causal: the t tokens given stand behind all others of their row in the cache.
        A position beyond `max_positions` is the caller's to refuse: looking would cost a copy from the
        device.
        """
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        table = rotary_table(positions, width=self.config.head_width, theta=self.config.rope_theta)
        x = embeds
        for index, layer in enumerate(self.layers):
            x = layer(x, table=table, mask=mask, cache=cache, layer=index)
        out: Tensor = self.norm(x)
        return out
