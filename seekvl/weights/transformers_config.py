"""`config.json` of the transformers layout (model types deepseek_vl, deepseek_vl_hybrid), read and written.

The top-level `tie_word_embeddings` is true by default there and misleading: the published weights are two
matrices, and two matrices are built. What counts is the key in `text_config`.
"""

from dataclasses import replace

from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.hybrid import HybridConfig
from seekvl.models.sam import SamConfig
from seekvl.models.siglip import Gelu, SiglipConfig
from seekvl.models.vl import VLConfig
from seekvl.runtime import SeekVLError
from seekvl.weights.official_config import BOOKKEEPING, read_llama, write_llama
from seekvl.weights.section import DEEPEST, Section

Norm = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of the three colour channels."""

GELUS: dict[str, Gelu] = {"gelu": "erf", "gelu_pytorch_tanh": "tanh"}
"""Name of the activation -> form of the GELU."""

TOWER_IGNORED = BOOKKEEPING | {
    "attention_dropout": "training only",
    "initializer_range": "training only",
    "initializer_factor": "training only",
    "num_pos_feats": "of SAM's prompt encoder, which is not part of these models",
    "scale": "of SAM's prompt encoder, which is not part of these models",
    "mlp_ratio": "mlp_dim says it",
    "vision_use_head": "whether the unused pooling head is stored",
    "output_hidden_states": "what a library returns",
}
"""Keys of a vision config that are ignored, each with its reason."""

TOP_IGNORED = BOOKKEEPING | {
    "tie_word_embeddings": "true by default and misleading: text_config says",
    "pad_token_id": "the tokenizer says",
    "bos_token_id": "the tokenizer says",
    "eos_token_id": "the tokenizer says",
    "image_token_id": "compared with the tokenizer",
    "use_cache": "how a library generates",
}
"""Top-level keys that are ignored, each with its reason."""


def read_transformers(config: Section) -> VLConfig:
    """Return the model config of a `config.json` in the transformers layout; its towers have no normalisation
    yet.
    """
    hybrid = config.text("model_type") == "deepseek_vl_hybrid"
    text = config.section("text_config")
    language = read_llama(text)
    low = _siglip(config.section("vision_config"))
    towers: SiglipConfig | HybridConfig = low
    if hybrid:
        towers = HybridConfig(high=_sam(config.section("high_res_vision_config"), grid=low.grid), low=low)
    adaptor = AdaptorConfig(
        kind="low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu",
        input_width=low.width,
        width=language.width,
    )
    config.finish(TOP_IGNORED)
    return VLConfig(vision=towers, adaptor=adaptor, language=language)


def _siglip(section: Section) -> SiglipConfig:
    """Return the SigLIP tower; absent keys have transformers' defaults, the tanh GELU among them."""
    section.must_be({"model_type": "siglip_vision_model", "num_channels": 3})
    activation = section.text("hidden_act", "gelu_pytorch_tanh")
    if activation not in GELUS:
        raise SeekVLError(
            f"{section.where}: hidden_act {activation!r} is unknown; known are {', '.join(GELUS)}"
        )
    config = SiglipConfig(
        image_size=section.integer("image_size", 224),
        patch_size=section.integer("patch_size", 16),
        width=section.integer("hidden_size", 768),
        layers=section.integer("num_hidden_layers", 12, most=DEEPEST),
        heads=section.integer("num_attention_heads", 12),
        mlp_width=section.integer("intermediate_size", 3072),
        gelu=GELUS[activation],
        norm_eps=section.number("layer_norm_eps", 1e-6),
    )
    section.finish(TOWER_IGNORED)
    return config


def _sam(section: Section, *, grid: int) -> SamConfig:
    """Return the SAM tower, whose map is brought to the grid of the other tower."""
    section.must_be(
        {"model_type": "sam_vision_model", "num_channels": 3, "hidden_act": "gelu", "qkv_bias": True}
        | {"use_abs_pos": True, "use_rel_pos": True}
    )
    width, channels = section.integer("hidden_size", 768), section.integer("output_channels", 256)
    hidden = section.integer("mlp_dim", int(width * section.number("mlp_ratio", 4.0)))
    section.must_be({"intermediate_size": hidden})  # in the published 7B, beside the key that counts
    config = SamConfig(
        image_size=section.integer("image_size", 1024),
        patch_size=section.integer("patch_size", 16),
        width=width,
        layers=section.integer("num_hidden_layers", 12, most=DEEPEST),
        heads=section.integer("num_attention_heads", 12),
        mlp_width=hidden,
        window=section.integer("window_size", 14),
        global_layers=section.integers("global_attn_indexes", (2, 5, 8, 11)),
        neck_channels=channels,
        downsample_channels=(2 * channels, 4 * channels),
        resize_side=4 * grid,
        norm_eps=section.number("layer_norm_eps", 1e-6),
    )
    section.finish(TOWER_IGNORED)
    return config


def with_norm(config: VLConfig, *, high: Norm | None, low: Norm) -> VLConfig:
    """Return the config with mean and deviation applied inside the towers, as the official networks do."""
    if isinstance(config.vision, HybridConfig):
        assert high is not None
        towers: SiglipConfig | HybridConfig = HybridConfig(
            high=replace(config.vision.high, pixel_mean=high[0], pixel_std=high[1]),
            low=replace(config.vision.low, pixel_mean=low[0], pixel_std=low[1]),
        )
    else:
        towers = replace(config.vision, pixel_mean=low[0], pixel_std=low[1])
    return replace(config, vision=towers)


def write_transformers(
    config: VLConfig, *, dtype: str, image_id: int, bos_id: int, eos_id: int
) -> dict[str, object]:
    """Return the `config.json` of the transformers layout for a model.

    Raises SeekVLError for what the layout cannot say.
    """
    hybrid = isinstance(config.vision, HybridConfig)
    text = write_llama(config.language) | {
        "attention_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "head_dim": config.language.head_width,
        "hidden_act": "silu",
        "mlp_bias": False,
        "rms_norm_eps": config.language.norm_eps,
        "rope_parameters": {"rope_theta": config.language.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": False,
    }
    text.pop("rope_theta", None)
    values: dict[str, object] = {
        "architectures": [
            "DeepseekVLHybridForConditionalGeneration" if hybrid else "DeepseekVLForConditionalGeneration"
        ],
        "dtype": dtype,
        "image_token_id": image_id,
        "model_type": "deepseek_vl_hybrid" if hybrid else "deepseek_vl",
        "text_config": text,
        "tie_word_embeddings": False,
    }
    if isinstance(config.vision, HybridConfig):
        values["high_res_vision_config"] = _write_sam(config.vision.high, grid=config.vision.low.grid)
        values["vision_config"] = _write_siglip(config.vision.low)
    else:
        values["vision_config"] = _write_siglip(config.vision)
    return values


def _write_siglip(config: SiglipConfig) -> dict[str, object]:
    """Return the vision config."""
    return {
        "attention_dropout": 0.0,
        "hidden_act": {form: name for name, form in GELUS.items()}[config.gelu],
        "hidden_size": config.width,
        "image_size": config.image_size,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": config.norm_eps,
        "model_type": "siglip_vision_model",
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch_size,
        "vision_use_head": False,
    }


def _write_sam(config: SamConfig, *, grid: int) -> dict[str, object]:
    """Return the config of the high-resolution tower."""
    channels = config.neck_channels
    if config.downsample_channels != (2 * channels, 4 * channels):
        raise SeekVLError(
            f"the transformers layout cannot say downsample channels {config.downsample_channels}: it knows "
            f"{(2 * channels, 4 * channels)}, two and four times the neck; use the official layout"
        )
    if config.resize_side != 4 * grid:
        raise SeekVLError(
            f"the transformers layout cannot say a resize to {config.resize_side}: it knows {4 * grid}, "
            "four times the grid; use the official layout"
        )
    return {
        "attention_dropout": 0.0,
        "global_attn_indexes": list(config.global_layers),
        "hidden_act": "gelu",
        "hidden_size": config.width,
        "image_size": config.image_size,
        "layer_norm_eps": config.norm_eps,
        "mlp_dim": config.mlp_width,
        "model_type": "sam_vision_model",
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.layers,
        "output_channels": channels,
        "patch_size": config.patch_size,
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "window_size": config.window,
    }
