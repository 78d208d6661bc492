"""The transformers layout (deepseek-community/deepseek-vl-*): which published key is which parameter of ours.

SigLIP keys exist in two spellings: `model.vision_model.vision_model.*` in the published files,
`model.vision_model.*` in files written by transformers 5. Both are read; the shorter one is written. A
pooling head may be stored and is not used.
"""

from collections.abc import Iterator

from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.hybrid import HybridConfig
from seekvl.models.sam import SamConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VLConfig
from seekvl.runtime import SeekVLError
from seekvl.weights.key_map import KeyMap, Operation, Shape, Target
from seekvl.weights.official import llama_pairs, rotary_tables

Triples = Iterator[tuple[str, str, Operation]]

SIGLIP = "model.vision_model"
SAM = "model.high_res_vision_model.vision_encoder"
THIRDS: dict[str, Operation] = {"q_proj": "rows0of3", "k_proj": "rows1of3", "v_proj": "rows2of3"}


def transformers_map(config: VLConfig) -> KeyMap:
    """Return the key map of the transformers layout for a model of this config.

    Raises SeekVLError for an adaptor that the layout cannot hold.
    """
    low = config.vision.low if isinstance(config.vision, HybridConfig) else config.vision
    triples = list(_adaptor(config.adaptor))
    if isinstance(config.vision, HybridConfig):
        triples += _sam(config.vision.high)
        triples += _siglip(low, ours="vision.low")
    else:
        triples += _siglip(low, ours="vision")
    targets = {theirs: Target(parameter=ours, operation=operation) for theirs, ours, operation in triples}
    for theirs, ours in llama_pairs(config.language, theirs="model.language_model", head="lm_head"):
        targets[theirs] = Target(parameter=ours)
    unused = _pooling(low) | rotary_tables(config.language, theirs="model.language_model")
    prefixes = {f"{SIGLIP}.vision_model.": f"{SIGLIP}."}
    return KeyMap(layout="transformers", targets=targets, unused=unused, prefixes=prefixes)


def _siglip(config: SiglipConfig, *, ours: str) -> Triples:
    """Yield (published key, parameter, operation) of a SigLIP tower: q, k and v are three tensors there, one
    here.
    """
    yield f"{SIGLIP}.embeddings.position_embedding.weight", f"{ours}.pos_embed", "unsqueeze0"
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for part in ("weight", "bias"):
        yield f"{SIGLIP}.embeddings.patch_embedding.{part}", f"{ours}.patch_embed.{part}", "copy"
        yield f"{SIGLIP}.post_layernorm.{part}", f"{ours}.norm.{part}", "copy"
        for layer in range(config.layers):
            block, target = f"{SIGLIP}.encoder.layers.{layer}", f"{ours}.blocks.{layer}"
            for theirs, name in names.items():
                yield f"{block}.{theirs}.{part}", f"{target}.{name}.{part}", "copy"
            for theirs, third in THIRDS.items():
                yield f"{block}.self_attn.{theirs}.{part}", f"{target}.attn.qkv.{part}", third


def _sam(config: SamConfig) -> Triples:
    """Yield (published key, parameter, operation) of the SAM tower, whose q, k and v stay fused."""
    ours = "vision.high"
    yield f"{SAM}.pos_embed", f"{ours}.pos_embed", "copy"
    yield "model.high_res_vision_alpha", f"{ours}.hd_alpha", "copy"
    for index in range(2):
        yield (
            f"model.high_res_vision_proj.conv{index + 1}.weight",
            f"{ours}.downsamples.{index}.weight",
            "copy",
        )
    for neck, target in ((f"{SAM}.neck", "neck"), ("model.high_res_vision_neck", "neck_hd")):
        for index in (1, 2):
            yield f"{neck}.conv{index}.weight", f"{ours}.{target}.conv{index}.weight", "copy"
            for part in ("weight", "bias"):
                yield f"{neck}.layer_norm{index}.{part}", f"{ours}.{target}.norm{index}.{part}", "copy"
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj"}
    names |= {"mlp.lin1": "mlp.fc1", "mlp.lin2": "mlp.fc2"}
    for part in ("weight", "bias"):
        yield f"{SAM}.patch_embed.projection.{part}", f"{ours}.patch_embed.{part}", "copy"
        for layer in range(config.layers):
            for theirs, name in names.items():
                yield f"{SAM}.layers.{layer}.{theirs}.{part}", f"{ours}.blocks.{layer}.{name}.{part}", "copy"
    for layer in range(config.layers):
        for axis in "hw":
            name = f"attn.rel_pos_{axis}"
            yield f"{SAM}.layers.{layer}.{name}", f"{ours}.blocks.{layer}.{name}", "copy"


def _adaptor(config: AdaptorConfig) -> Triples:
    """Yield (published key, parameter, operation) of the adaptor, which this layout has with depth 2 only."""
    names = {
        "mlp_gelu": {"linear1": "layers.0", "linear2": "layers.1"},
        "low_high_hybrid_split_mlp_gelu": {
            "high_res_vision_proj": "high_up",
            "vision_proj": "low_up",
            "proj": "layers.0",
        },
    }
    if config.kind not in names or config.depth != 2:
        raise SeekVLError(
            f"the transformers layout has no place for an adaptor {config.kind!r} of depth {config.depth}: "
            f"it knows {' and '.join(names)} of depth 2; use the official layout"
        )
    for part in ("weight", "bias"):
        for theirs, ours in names[config.kind].items():
            yield f"model.aligner.{theirs}.{part}", f"adaptor.{ours}.{part}", "copy"


def _pooling(config: SiglipConfig) -> dict[str, Shape | None]:
    """Return the 11 tensors of the pooling head that `vision_use_head` stores and that is never run."""
    c, m = config.width, config.mlp_width
    return {
        f"{SIGLIP}.head.probe": (1, 1, c),
        f"{SIGLIP}.head.attention.in_proj_weight": (3 * c, c),
        f"{SIGLIP}.head.attention.in_proj_bias": (3 * c,),
        f"{SIGLIP}.head.attention.out_proj.weight": (c, c),
        f"{SIGLIP}.head.attention.out_proj.bias": (c,),
        f"{SIGLIP}.head.layernorm.weight": (c,),
        f"{SIGLIP}.head.layernorm.bias": (c,),
        f"{SIGLIP}.head.mlp.fc1.weight": (m, c),
        f"{SIGLIP}.head.mlp.fc1.bias": (m,),
        f"{SIGLIP}.head.mlp.fc2.weight": (c, m),
        f"{SIGLIP}.head.mlp.fc2.bias": (c,),
    }
