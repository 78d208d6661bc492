"""The official layout of DeepSeek-VL (deepseek-ai/deepseek-vl-*): which published key is which
parameter of ours.

Present in the files and used by no forward pass: the pooling head of each SigLIP tower (13 tensors) and two
layer norms of the hybrid tower (4 tensors). Older tools also wrote rotary tables, which are computed here.
"""

from collections.abc import Iterator

from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.hybrid import HybridConfig
from seekvl.models.llama import LlamaConfig
from seekvl.models.sam import SamConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VLConfig
from seekvl.weights.key_map import KeyMap, Shape, Target

Pairs = Iterator[tuple[str, str]]

LOW = "vision_model.vision_tower_low.vision_tower"
HIGH = "vision_model.vision_tower_high.vision_tower"
SINGLE = "vision_model.vision_tower"


def official_map(config: VLConfig) -> KeyMap:
    """Return the key map of the official layout for a model of this config."""
    pairs: dict[str, str] = {}
    unused: dict[str, Shape | None] = {}
    if isinstance(config.vision, HybridConfig):
        pairs |= dict(_sam(config.vision.high, theirs=HIGH, ours="vision.high"))
        pairs |= dict(siglip_pairs(config.vision.low, theirs=LOW, ours="vision.low"))
        unused |= pooling_head(config.vision.low, theirs=LOW)
        for norm in ("high_layer_norm", "low_layer_norm"):
            for part in ("weight", "bias"):
                unused[f"vision_model.{norm}.{part}"] = (config.vision.low.width,)
    else:
        pairs |= dict(siglip_pairs(config.vision, theirs=SINGLE, ours="vision"))
        unused |= pooling_head(config.vision, theirs=SINGLE)
    pairs |= dict(_adaptor(config.adaptor))
    pairs |= dict(llama_pairs(config.language, theirs="language_model.model", head="language_model.lm_head"))
    unused |= rotary_tables(config.language, theirs="language_model.model")
    targets = {theirs: Target(parameter=ours) for theirs, ours in pairs.items()}
    return KeyMap(layout="official", targets=targets, unused=unused, prefixes={})


def siglip_pairs(config: SiglipConfig, *, theirs: str, ours: str) -> Pairs:
    """Yield (published key, parameter) of a SigLIP tower."""
    yield f"{theirs}.pos_embed", f"{ours}.pos_embed"
    for part in ("weight", "bias"):
        yield f"{theirs}.patch_embed.proj.{part}", f"{ours}.patch_embed.{part}"
        yield f"{theirs}.norm.{part}", f"{ours}.norm.{part}"
        for layer in range(config.layers):
            for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
                yield f"{theirs}.blocks.{layer}.{name}.{part}", f"{ours}.blocks.{layer}.{name}.{part}"


def _sam(config: SamConfig, *, theirs: str, ours: str) -> Pairs:
    """Yield (published key, parameter) of the SAM tower."""
    yield f"{theirs}.pos_embed", f"{ours}.pos_embed"
    yield f"{theirs}.hd_alpha_downsamples", f"{ours}.hd_alpha"
    for index in range(2):
        yield f"{theirs}.downsamples.{index}.weight", f"{ours}.downsamples.{index}.weight"
    for neck in ("neck", "neck_hd"):
        for index, name in enumerate(("conv1.weight", "norm1.weight", "conv2.weight", "norm2.weight")):
            yield f"{theirs}.{neck}.{index}.weight", f"{ours}.{neck}.{name}"
        for index, name in ((1, "norm1.bias"), (3, "norm2.bias")):
            yield f"{theirs}.{neck}.{index}.bias", f"{ours}.{neck}.{name}"
    for part in ("weight", "bias"):
        yield f"{theirs}.patch_embed.proj.{part}", f"{ours}.patch_embed.{part}"
    for layer in range(config.layers):
        block, target = f"{theirs}.blocks.{layer}", f"{ours}.blocks.{layer}"
        for axis in "hw":
            yield f"{block}.attn.rel_pos_{axis}", f"{target}.attn.rel_pos_{axis}"
        for part in ("weight", "bias"):
            for name in ("norm1", "norm2", "attn.qkv", "attn.proj"):
                yield f"{block}.{name}.{part}", f"{target}.{name}.{part}"
            for index in (1, 2):
                yield f"{block}.mlp.lin{index}.{part}", f"{target}.mlp.fc{index}.{part}"


def _adaptor(config: AdaptorConfig) -> Pairs:
    """Yield (published key, parameter) of the adaptor; the published index counts GELUs, ours does not."""
    for part in ("weight", "bias"):
        if config.is_hybrid:
            yield f"aligner.high_up_proj.{part}", f"adaptor.high_up.{part}"
            yield f"aligner.low_up_proj.{part}", f"adaptor.low_up.{part}"
            for index in range(config.depth - 1):
                yield f"aligner.layers.{2 * index + 1}.{part}", f"adaptor.layers.{index}.{part}"
        elif config.kind == "linear":
            yield f"aligner.layers.{part}", f"adaptor.layers.0.{part}"
        elif config.kind == "mlp_gelu":
            for index in range(config.depth):
                yield f"aligner.layers.{2 * index}.{part}", f"adaptor.layers.{index}.{part}"


def llama_pairs(config: LlamaConfig, *, theirs: str, head: str) -> Pairs:
    """Yield (published key, parameter) of the language model, alike in both layouts but for a prefix."""
    yield f"{theirs}.embed_tokens.weight", "language.embed_tokens.weight"
    yield f"{theirs}.norm.weight", "language.norm.weight"
    yield f"{head}.weight", "language.lm_head.weight"
    for layer in range(config.layers):
        block, target = f"{theirs}.layers.{layer}", f"language.layers.{layer}"
        yield f"{block}.input_layernorm.weight", f"{target}.attn_norm.weight"
        yield f"{block}.post_attention_layernorm.weight", f"{target}.mlp_norm.weight"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{block}.self_attn.{name}.weight", f"{target}.attn.{name}.weight"
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"{block}.mlp.{name}.weight", f"{target}.mlp.{name}.weight"


def rotary_tables(config: LlamaConfig, *, theirs: str) -> dict[str, Shape | None]:
    """Return the rotary tables that older tools stored with each layer: computed here, never read."""
    shape = (config.head_width // 2,)
    return {f"{theirs}.layers.{layer}.self_attn.rotary_emb.inv_freq": shape for layer in range(config.layers)}


def pooling_head(config: SiglipConfig, *, theirs: str) -> dict[str, Shape | None]:
    """Return the 13 tensors of the pooling head behind every published SigLIP tower, which is never run."""
    c, m = config.width, config.mlp_width
    weights = {"q": (c, c), "kv": (2 * c, c), "proj": (c, c), "mlp.fc1": (m, c), "mlp.fc2": (c, m)}
    shapes: dict[str, Shape | None] = {f"{theirs}.attn_pool.latent": (1, 1, c)}
    for name, shape in weights.items():
        shapes[f"{theirs}.attn_pool.{name}.weight"] = shape
        shapes[f"{theirs}.attn_pool.{name}.bias"] = shape[:1]
    for part in ("weight", "bias"):
        shapes[f"{theirs}.attn_pool.norm.{part}"] = (c,)
    return shapes
