"""What a network costs: parameters, floating-point operations, bytes of cache. Counted from its config alone.

Letters: t tokens, n pictures, c width, m MLP width. A multiply-add counts as two operations, as usual.
"""

import math

from seekvl.models.adaptor import POOLING_SIDE, AdaptorConfig
from seekvl.models.attention import OTHER_SCORES
from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.hybrid import HybridConfig
from seekvl.models.llama import LlamaConfig
from seekvl.models.mla import MlaConfig
from seekvl.models.moe import MoeConfig
from seekvl.models.sam import SamConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl2 import AnyConfig, on_meta


def parameters(config: AnyConfig) -> dict[str, int]:
    """Return the number of parameters of each part: vision, adaptor, language, and in VL2 the two marks of
    the picture layout.
    """
    model = on_meta(config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    marks = sum(p.numel() for p in model.parameters(recurse=False))
    return parts | {"marks": marks} if marks else parts


def active_parameters(config: LlamaConfig | DeepseekV2Config) -> int:
    """Return the parameters of the decoder that work on one token: all but the embedding, the norms and the
    experts that are not chosen.
    """
    return (
        config.layers * _attention_matrices(config) + _mlp_matrices(config) + config.width * config.vocab_size
    )


def step_parameters(config: LlamaConfig | DeepseekV2Config, *, rows: int = 1) -> float:
    """Return the parameters that a decoding step of so many rows reads: `active_parameters`, and with more
    rows than one the experts that the others choose.

    Rows choose alone and evenly here, so that of E experts E (1 - (1 - k/E)^rows) are read on average.
    """
    found = float(active_parameters(config))
    if isinstance(config, DeepseekV2Config) and config.moe is not None:
        moe = config.moe
        sparse = sum(config.has_experts(layer) for layer in range(config.layers))
        read = moe.experts * (1 - (1 - moe.active / moe.experts) ** rows)
        found += sparse * 3 * moe.width * config.width * (read - moe.active)
    return found


def cache_bytes_per_token(config: LlamaConfig | DeepseekV2Config, *, bytes_per_number: int = 2) -> int:
    """Return the bytes that one token takes in the cache over all layers."""
    return config.layers * sum(heads * width for heads, width in config.cache_shape) * bytes_per_number


def language_flops(
    config: LlamaConfig | DeepseekV2Config, *, tokens: int, past: int = 0, heads_out: int = 1
) -> int:
    """Return the operations of one forward of `tokens` new tokens after `past` cached ones.

    `heads_out` positions pass the head: 1 in prefill and decoding, all supervised ones in training.
    """
    matrices = config.layers * _attention_matrices(config) + _mlp_matrices(config)
    visible = tokens * past + tokens * (tokens + 1) // 2
    pair, latent = 2 * config.heads * config.head_width, 0
    if isinstance(config, DeepseekV2Config) and config.mla is not None:
        mla, h = config.mla, config.heads
        if tokens == 1:
            pair = h * (2 * mla.kv_rank + mla.rope_width)
        else:
            pair = h * (mla.query_width + mla.value_width)
            latent = past * _latent_matrix(config.mla, heads=h)
    attention = config.layers * (pair * visible + latent)
    return 2 * (matrices * tokens + attention + heads_out * config.width * config.vocab_size)


def _attention_matrices(config: LlamaConfig | DeepseekV2Config) -> int:
    """Numbers in the matrices of one layer's attention."""
    c, h = config.width, config.heads
    if isinstance(config, DeepseekV2Config) and config.mla is not None:
        mla = config.mla
        own = c * (h * mla.query_width + mla.kv_rank + mla.rope_width + h * mla.value_width)
        return own + _latent_matrix(mla, heads=h)
    return 2 * c * c + 2 * c * config.kv_heads * config.head_width


def _latent_matrix(mla: MlaConfig, *, heads: int) -> int:
    """Numbers in the matrix from latent to keys and values, which prefill takes to every cached token."""
    return mla.kv_rank * heads * (mla.nope_width + mla.value_width)


def _mlp_matrices(config: LlamaConfig | DeepseekV2Config) -> int:
    """Numbers that one token meets in the SwiGLUs and experts of all layers."""
    dense = 3 * config.width * config.mlp_width
    if not isinstance(config, DeepseekV2Config) or config.moe is None:
        return config.layers * dense
    sparse = sum(config.has_experts(layer) for layer in range(config.layers))
    return (config.layers - sparse) * dense + sparse * _moe_matrices(config.moe, width=config.width)


def _moe_matrices(moe: MoeConfig, *, width: int) -> int:
    """Numbers that one token meets in router, chosen and shared experts of one layer."""
    return moe.experts * width + 3 * (moe.active + moe.shared) * moe.width * width


def siglip_flops(config: SiglipConfig, *, pictures: int = 1) -> int:
    """Return the operations of one forward of the SigLIP tower."""
    t, c = config.grid**2, config.width
    patches = 3 * config.patch_size**2 * c * t
    blocks = config.layers * (t * (4 * c * c + 2 * c * config.mlp_width) + 2 * t * t * c)
    return 2 * pictures * (patches + blocks)


def sam_flops(config: SamConfig, *, pictures: int = 1) -> int:
    """Return the operations of one forward of the SAM tower with neck, side branch and downsampling."""
    t, c, w = config.grid**2, config.width, config.window
    total = 3 * config.patch_size**2 * c * t
    for layer in range(config.layers):
        if layer in config.global_layers:
            squares, side = 1, config.grid
        else:
            squares, side = math.ceil(config.grid / w) ** 2, w
        s = side * side
        total += 4 * t * c * c + squares * (2 * s * s * c + 2 * s * side * c) + 2 * t * c * config.mlp_width
    k, (first, second) = config.neck_channels, config.downsample_channels
    neck = t * (c * k + 9 * k * k)
    out = config.out_grid**2
    down = 4 * out * 9 * k * first + out * 9 * first * second
    return 2 * pictures * (total + 2 * neck + down)


def adaptor_flops(config: AdaptorConfig, *, grid: int) -> int:
    """Return the operations of the adaptor for one picture or tile of grid x grid features."""
    c, d, rows = config.input_width, config.width, config.out_grid(grid) ** 2
    total = POOLING_SIDE**2 * c * c * (grid // POOLING_SIDE) ** 2 if config.token_pooling else 0
    if config.kind == "identity":
        return 2 * total
    if config.kind == "downsample_mlp_gelu":
        hidden = d * config.mlp_ratio
        row = c * config.downsample**2 * hidden + (config.depth - 2) * hidden**2 + hidden * d
    else:
        row = c * d + (config.depth - 1) * d * d * (config.kind != "linear")
    return 2 * (total + rows * row)


def vision_flops(config: AnyConfig, *, pictures: int = 1) -> int:
    """Return the operations of towers and adaptor for `pictures` pictures, or tiles of VL2."""
    vision = config.vision
    if isinstance(vision, HybridConfig):
        towers = sam_flops(vision.high, pictures=pictures) + siglip_flops(vision.low, pictures=pictures)
        grid = vision.low.grid
    else:
        towers, grid = siglip_flops(vision, pictures=pictures), vision.grid
    return towers + pictures * adaptor_flops(config.adaptor, grid=grid)


def language_activation_bytes(
    config: LlamaConfig | DeepseekV2Config, *, tokens: int, past: int = 0, bytes_per_number: int = 2
) -> int:
    """Return the bytes alive at the busiest moment of a forward of `tokens` new tokens after `past` cached
    ones, without gradients and with fused attention.
    """
    d, stream = config.width, 2 * config.width
    seen = tokens + past
    qkv = (config.heads + 2 * config.kv_heads) * config.head_width
    rotated = 2 * config.heads * config.head_width * 4  # two products in float32 beside the halves
    attention = tokens * ((stream + qkv + d) * bytes_per_number + rotated)
    if isinstance(config, DeepseekV2Config) and config.mla is not None:
        mla, h = config.mla, config.heads
        per_key = h * (2 * mla.nope_width + mla.value_width + 2 * mla.query_width)  # kv, k, padded v
        attention = (seen * per_key + tokens * (stream + 3 * h * mla.query_width)) * bytes_per_number
    mask = tokens * seen if past else 0
    mlp = tokens * (stream + 2 * config.mlp_width) * bytes_per_number
    if isinstance(config, DeepseekV2Config) and config.moe is not None:
        moe = config.moe
        sorted_in = tokens * moe.active * (d + 2 * moe.width) * bytes_per_number
        out = tokens * moe.active * d * (2 * bytes_per_number + 4)  # sorted, unsorted, weighted in float32
        mlp = max(mlp, tokens * stream * bytes_per_number + max(sorted_in, out))
    return max(attention, mlp) + mask


def vision_activation_bytes(config: AnyConfig, *, pictures: int = 1, bytes_per_number: int = 2) -> int:
    """Return the bytes alive at the busiest moment of the towers, for pictures, or tiles of VL2, that pass
    them at once.
    """
    vision = config.vision
    if isinstance(vision, HybridConfig):
        return pictures * max(
            _sam_activations(vision.high, bytes_per_number), _siglip_activations(vision.low, bytes_per_number)
        )
    return pictures * _siglip_activations(vision, bytes_per_number)


def _siglip_activations(config: SiglipConfig, bytes_per_number: int) -> int:
    """Bytes of one picture in the SigLIP tower: stream, its norm, and the wider of attention and MLP."""
    wide = max(4 * config.width, 2 * config.mlp_width)
    return config.grid**2 * (2 * config.width + wide) * bytes_per_number


def _sam_activations(config: SamConfig, bytes_per_number: int) -> int:
    """Bytes of one picture in the SAM tower: the biases of a global block, as many as are there at once,
    outweigh all else.
    """
    t, side = config.grid**2, config.grid
    bias = min(config.heads * t * t, OTHER_SCORES) + config.heads * t * 2 * side
    return (bias + t * 6 * config.width) * bytes_per_number
