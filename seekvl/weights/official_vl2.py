"""The official layout of DeepSeek-VL2 (deepseek-ai/deepseek-vl2*): which published key is which parameter of
ours.

Each expert is published as three matrices of its own; here the matrices of all experts of a layer are one
stack. `view_seperator` is spelt so in the files. Present in the files and used by no forward pass: the
pooling head of the tower (13 tensors).
"""

from collections.abc import Iterator

from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.vl2 import VL2Config
from seekvl.weights.key_map import KeyMap, Target
from seekvl.weights.official import Pairs, pooling_head, siglip_pairs

MODEL = "language.model"
MLP = ("gate_proj", "up_proj", "down_proj")


def vl2_map(config: VL2Config) -> KeyMap:
    """Return the key map of the official layout for a model of this config."""
    pairs = {"image_newline": "image_newline", "view_seperator": "view_separator"}
    pairs |= dict(siglip_pairs(config.vision, theirs="vision", ours="vision"))
    pairs |= dict(_adaptor(config.adaptor))
    pairs |= dict(_language(config.language))
    targets = {theirs: Target(parameter=ours) for theirs, ours in pairs.items()}
    for layer in _sparse_layers(config.language):
        targets |= dict(_experts(config.language, layer=layer))
    unused = pooling_head(config.vision, theirs="vision")
    return KeyMap(layout="official", targets=targets, unused=unused, prefixes={})


def _adaptor(config: AdaptorConfig) -> Pairs:
    """Yield (published key, parameter) of the adaptor; the published index counts GELUs, ours does not."""
    for part in ("weight", "bias"):
        if config.kind == "linear":
            yield f"projector.layers.{part}", f"adaptor.layers.0.{part}"
        elif config.kind != "identity":
            for index in range(config.depth):
                yield f"projector.layers.{2 * index}.{part}", f"adaptor.layers.{index}.{part}"
        if config.token_pooling:
            yield f"projector.token_pooling_layer.{part}", f"adaptor.token_pooling_layer.{part}"


def _language(config: DeepseekV2Config) -> Pairs:
    """Yield (published key, parameter) of the language model without its experts."""
    yield f"{MODEL}.embed_tokens.weight", "language.embed_tokens.weight"
    yield f"{MODEL}.norm.weight", "language.norm.weight"
    yield "language.lm_head.weight", "language.lm_head.weight"
    names = {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    if config.mla is not None:
        names = {"q_proj": "q_proj", "kv_a_proj_with_mqa": "kv_a_proj", "kv_a_layernorm": "kv_a_norm"}
        names |= {"kv_b_proj": "kv_b_proj", "o_proj": "o_proj"}
    sparse = set(_sparse_layers(config))
    for layer in range(config.layers):
        block, target = f"{MODEL}.layers.{layer}", f"language.layers.{layer}"
        yield f"{block}.input_layernorm.weight", f"{target}.attn_norm.weight"
        yield f"{block}.post_attention_layernorm.weight", f"{target}.mlp_norm.weight"
        for theirs, ours in names.items():
            yield f"{block}.self_attn.{theirs}.weight", f"{target}.attn.{ours}.weight"
        if layer in sparse:
            yield from _router_and_shared(config, theirs=f"{block}.mlp", ours=f"{target}.mlp")
        else:
            for name in MLP:
                yield f"{block}.mlp.{name}.weight", f"{target}.mlp.{name}.weight"


def _router_and_shared(config: DeepseekV2Config, *, theirs: str, ours: str) -> Pairs:
    """Yield (published key, parameter) of what a mixture has besides its routed experts."""
    assert config.moe is not None
    yield f"{theirs}.gate.weight", f"{ours}.gate.weight"
    if config.moe.choice == "noaux_tc":
        yield f"{theirs}.gate.e_score_correction_bias", f"{ours}.gate.bias"
    if config.moe.shared:
        for name in MLP:
            yield f"{theirs}.shared_experts.{name}.weight", f"{ours}.shared.{name}.weight"


def _experts(config: DeepseekV2Config, *, layer: int) -> Iterator[tuple[str, Target]]:
    """Yield (published key, place in a stack) of the routed experts of a layer."""
    assert config.moe is not None
    for index in range(config.moe.experts):
        for name in MLP:
            target = Target(
                parameter=f"language.layers.{layer}.mlp.experts.{name}", operation="expert", index=index
            )
            yield f"{MODEL}.layers.{layer}.mlp.experts.{index}.{name}.weight", target


def _sparse_layers(config: DeepseekV2Config) -> list[int]:
    """List the layers whose MLP is a mixture of experts."""
    return [layer for layer in range(config.layers) if config.has_experts(layer)]
