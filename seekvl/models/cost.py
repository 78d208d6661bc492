"""What a network costs: parameters, floating-point operations, bytes of cache. Counted from its config alone.

Letters: t tokens, n pictures, c width, m MLP width. A multiply-add counts as two operations, as usual.
"""

import math

from seekvl.models.hybrid import HybridConfig
from seekvl.models.llama import LlamaConfig
from seekvl.models.sam import SamConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VLConfig, on_meta


def parameters(config: VLConfig) -> dict[str, int]:
    """Return the number of parameters of each part: vision, adaptor, language."""
    return {
        name: sum(p.numel() for p in part.parameters()) for name, part in on_meta(config).named_children()
    }


def cache_bytes_per_token(config: LlamaConfig, *, bytes_per_number: int = 2) -> int:
    """Return the bytes that keys and values of one token take over all layers."""
    return 2 * config.layers * config.kv_heads * config.head_width * bytes_per_number


def language_flops(config: LlamaConfig, *, tokens: int, past: int = 0, heads_out: int = 1) -> int:
    """Return the operations of one forward of `tokens` new tokens after `past` cached ones.

    `heads_out` positions pass the head: 1 in prefill and decoding, all supervised ones in training.
    """
    c, kv = config.width, config.kv_heads * config.head_width
    matrices = config.layers * (2 * c * c + 2 * c * kv + 3 * c * config.mlp_width)
    visible = tokens * past + tokens * (tokens + 1) // 2
    attention = config.layers * 2 * config.heads * config.head_width * visible
    return 2 * (matrices * tokens + attention + heads_out * c * config.vocab_size)


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
        total += squares * (4 * s * c * c + 2 * s * s * c + 2 * s * side * c) + 2 * t * c * config.mlp_width
    k, (first, second) = config.neck_channels, config.downsample_channels
    neck = t * (c * k + 9 * k * k)
    out = config.out_grid**2
    down = 4 * out * 9 * k * first + out * 9 * first * second
    return 2 * pictures * (total + 2 * (neck + down))


def vision_flops(config: VLConfig, *, pictures: int = 1) -> int:
    """Return the operations of towers and adaptor for `pictures` pictures."""
    vision, adaptor = config.vision, config.adaptor
    if isinstance(vision, HybridConfig):
        towers = sam_flops(vision.high, pictures=pictures) + siglip_flops(vision.low, pictures=pictures)
        entry = adaptor.input_width * adaptor.width
    else:
        towers = siglip_flops(vision, pictures=pictures)
        entry = adaptor.input_width * adaptor.width
    rows = config.visual_tokens * pictures
    return towers + 2 * rows * (entry + (adaptor.depth - 1) * adaptor.width**2)
