"""DeepSeekMoE decoder: the language model of DeepSeek-VL2 (2412.10302, sec. 2; 2405.04434, sec. 2).

The LLaMA decoder with two parts exchanged: attention may go through a latent (small and base; tiny keeps
plain heads), and after the first layers experts stand in the place of the SwiGLU.

Letters: b rows, t new tokens, s visible tokens, d width, v vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seekvl.models.llama import Attention, CacheShape, LayerCache, Mlp, RmsNorm, check_heads, rotary_table
from seekvl.models.mla import Mla, MlaConfig
from seekvl.models.moe import Moe, MoeConfig, RouterRecord
from seekvl.runtime import SeekVLError, check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepseekV2Config:
    """Dimensions of the decoder. Embedding and head are two matrices: the published weights are untied."""

    vocab_size: int
    """Rows of embedding and head; the published files have more rows than the tokenizer has entries."""
    width: int
    layers: int
    heads: int
    kv_heads: int
    """Key-value heads of plain attention; with a latent every head has its own."""
    mlp_width: int
    """Hidden channels of the SwiGLU of a layer without experts."""
    max_positions: int = 4096
    """Longest sequence, tokens; rotary positions are not scaled."""
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    mla: MlaConfig | None
    """Latent attention, or None for plain attention as in tiny."""
    moe: MoeConfig | None
    """Experts, or None for a SwiGLU in every layer."""
    dense_first: int
    """Layers at the start that keep the SwiGLU."""
    moe_every: int = 1
    """After those, layers whose index this divides have experts."""

    def __post_init__(self) -> None:
        check_positive("DeepSeek-V2", self, or_zero=("dense_first",))
        if self.mla is None:
            check_heads("DeepSeek-V2", width=self.width, heads=self.heads, kv_heads=self.kv_heads)
        elif self.kv_heads != self.heads:
            raise SeekVLError(
                f"DeepSeek-V2: latent attention gives each of the {self.heads} heads its own key and value, "
                f"kv_heads {self.kv_heads} cannot be"
            )

    @property
    def head_width(self) -> int:
        """Channels of a head's query."""
        return self.width // self.heads if self.mla is None else self.mla.query_width

    @property
    def rope_width(self) -> int:
        """Channels of a head that carry the position."""
        return self.head_width if self.mla is None else self.mla.rope_width

    @property
    def cache_shape(self) -> CacheShape:
        """What a layer caches of one token: keys and values of each head, or rotary key and latent."""
        if self.mla is None:
            return (self.kv_heads, self.head_width), (self.kv_heads, self.head_width)
        return (1, self.mla.rope_width), (1, self.mla.kv_rank)

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, is a mixture of experts."""
        return self.moe is not None and layer >= self.dense_first and layer % self.moe_every == 0


class Layer(nn.Module):
    """Pre-norm decoder layer."""

    attn: Attention | Mla
    mlp: Mlp | Moe

    def __init__(self, config: DeepseekV2Config, *, layer: int) -> None:
        super().__init__()
        self.attn_norm = RmsNorm(config.width, eps=config.norm_eps)
        if config.mla is None:
            self.attn = Attention(config.width, heads=config.heads, kv_heads=config.kv_heads)
        else:
            self.attn = Mla(config.width, heads=config.heads, config=config.mla)
        self.mlp_norm = RmsNorm(config.width, eps=config.norm_eps)
        if config.moe is not None and config.has_experts(layer):
            self.mlp = Moe(config.width, config.moe)
        else:
            self.mlp = Mlp(config.width, config.mlp_width)

    def forward(
        self,
        x: Tensor,
        *,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: LayerCache | None,
        record: RouterRecord | None,
        layer: int,
    ) -> Tensor:
        """Apply attention and SwiGLU or experts to x[b, t, d], each added to the stream."""
        x = x + self.attn(self.attn_norm(x), table=table, mask=mask, cache=cache, layer=layer)
        y = self.mlp_norm(x)
        y = self.mlp(y, record=record, layer=layer) if isinstance(self.mlp, Moe) else self.mlp(y)
        out: Tensor = x + y
        return out


class DeepseekV2(nn.Module):
    """The decoder between embedding and head."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, layer=index) for index in range(config.layers))
        self.norm = RmsNorm(config.width, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(
        self,
        embeds: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        record: RouterRecord | None = None,
    ) -> Tensor:
        """Turn embeddings f[b, t, d] into hidden states f[b, t, d] after the final norm.

        Positions, mask and cache are those of `Llama.forward`; a record takes down what the routers did, for
        training.
        """
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        table = rotary_table(positions, width=self.config.rope_width, theta=self.config.rope_theta)
        x = embeds
        for index, layer in enumerate(self.layers):
            x = layer(x, table=table, mask=mask, cache=cache, record=record, layer=index)
        out: Tensor = self.norm(x)
        return out
