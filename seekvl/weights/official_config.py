"""`config.json` of the official layout, read and written.

Published files name a preset for each vision tower and give no dimensions. Smaller models of the same design
put overriding keys beside the name: `width`, `layers`, `heads`, `patch_size`, `mlp_ratio`,
`global_attn_indexes`, `prompt_embed_dim`, `downsample_channels`, and, seekvl's own, `window_size` and
`interpolate_size`.
"""

from dataclasses import replace

from seekvl.models.adaptor import AdaptorConfig, AdaptorKind
from seekvl.models.hybrid import HybridConfig
from seekvl.models.llama import LlamaConfig
from seekvl.models.sam import SamConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VLConfig
from seekvl.presets import SAM_TOWERS, SIGLIP_TOWERS
from seekvl.runtime import SeekVLError
from seekvl.weights.section import DEEPEST, Section

BOOKKEEPING = {
    "architectures": "the class a library would build; model_type already says it",
    "auto_map": "remote code, which is never fetched or run",
    "dtype": "read as the stored dtype, where it matters",
    "torch_dtype": "the older name of dtype",
    "model_type": "checked before",
    "transformers_version": "who wrote the file",
    "_name_or_path": "where the writer found it",
    "_commit_hash": "where the writer found it",
    "_attn_implementation": "how a library computes attention, not what",
    "_attn_implementation_autoset": "how a library computes attention, not what",
}
"""Keys that say nothing about the network, each with the reason why it is ignored."""

LLAMA_IGNORED = BOOKKEEPING | {
    "attention_dropout": "training only",
    "initializer_range": "training only",
    "use_cache": "how a library generates",
    "bos_token_id": "absent or LLaMA's default 1 in published files, which is wrong: the tokenizer says",
    "eos_token_id": "absent or LLaMA's default 2 in published files, which is wrong: the tokenizer says",
    "pad_token_id": "the tokenizer says",
}
"""Keys of a language config that are ignored, each with its reason."""

LLAMA_FIXED: dict[str, object] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "rope_scaling": None,
}
"""What every published language model is; anything else would be another network."""

MLP_RATIOS = {"siglip_large_patch16_384": 4.0, "siglip_so400m_patch14_384": 3.7362}
"""MLP width of each SigLIP preset, over its width; the product is truncated."""

KINDS: dict[str, AdaptorKind] = {
    kind: kind for kind in ("identity", "linear", "mlp_gelu", "low_high_hybrid_split_mlp_gelu")
}


def read_official(config: Section) -> VLConfig:
    """Return the model config of a `config.json` in the official layout.

    Tower parameters that the towers do not know are ignored, as the reference swallows them. Raises
    SeekVLError for anything else unknown, and for switches that would make another network.
    """
    if any(key.startswith("gen_") for key in config.values):
        raise SeekVLError(
            f"{config.where}: a Janus checkpoint (it generates pictures too), which seekvl does not build"
        )
    vision = config.section("vision_config")
    tower = vision.text("cls")
    params = vision.section("params")
    towers: SiglipConfig | HybridConfig
    if tower == "CLIPVisionTower":
        towers = _siglip(params)
    elif tower == "HybridVisionTower":
        params.must_be({"concat_type": "tuple"})
        towers = HybridConfig(
            high=_sam(params.section("high_res_cfg")), low=_siglip(params.section("low_res_cfg"))
        )
    else:
        raise SeekVLError(
            f"{vision.where}: cls {tower!r} is unknown; known are CLIPVisionTower, HybridVisionTower"
        )
    vision.finish(BOOKKEEPING)
    language = read_llama(config.section("language_config"))
    adaptor = _adaptor(config.section("aligner_config"))
    config.must_be({"tie_word_embeddings": False})
    config.finish(BOOKKEEPING)
    return VLConfig(vision=towers, adaptor=adaptor, language=language)


def read_llama(section: Section) -> LlamaConfig:
    """Return the language config; absent keys have the values of LLaMA-7B, as the published 7B expects."""
    section.must_be(LLAMA_FIXED)
    theta = section.number("rope_theta", 10000.0)
    rope = section.section_if_any("rope_parameters")
    if rope is not None:
        theta = rope.number("rope_theta", theta)
        rope.must_be({"rope_type": "default"})
        rope.finish({})
    width, heads = section.integer("hidden_size", 4096), section.integer("num_attention_heads", 32)
    if heads < 1 or width % heads:
        raise SeekVLError(f"{section.where}: hidden_size {width} is not divisible by {heads} attention heads")
    section.must_be({"head_dim": width // heads})
    config = LlamaConfig(
        vocab_size=section.integer("vocab_size"),
        width=width,
        layers=section.integer("num_hidden_layers", 32, most=DEEPEST),
        heads=heads,
        kv_heads=section.integer("num_key_value_heads", heads),
        mlp_width=section.integer("intermediate_size", 11008),
        max_positions=section.integer("max_position_embeddings", 2048),
        norm_eps=section.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
    )
    section.finish(LLAMA_IGNORED)
    return config


def _siglip(params: Section) -> SiglipConfig:
    """Return a SigLIP tower: the named preset, overridden by the keys beside it."""
    name = params.text("model_name")
    if name not in SIGLIP_TOWERS:
        raise SeekVLError(
            f"{params.where}: model_name {name!r} is unknown; known are {', '.join(SIGLIP_TOWERS)}"
        )
    params.must_be({"select_feature": "same"})
    preset = SIGLIP_TOWERS[name]
    width = params.integer("width", preset.width)
    built = params.integer("layers", preset.layers, most=DEEPEST)
    return replace(
        preset,
        image_size=params.integer("image_size", preset.image_size),
        patch_size=params.integer("patch_size", preset.patch_size),
        width=width,
        layers=_selected(params, built),
        heads=params.integer("heads", preset.heads),
        mlp_width=int(width * params.number("mlp_ratio", MLP_RATIOS[name])),
        pixel_mean=params.rgb("pixel_mean"),
        pixel_std=params.rgb("pixel_std"),
    )


def _selected(params: Section, layers: int) -> int:
    """Return how many of the layers are built: select_layer -1 means all, -2 all but the last, 5 the first
    five.
    """
    value = params.values.get("select_layer", -1)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SeekVLError(f"{params.where}: select_layer is {value!r}, expected a whole number")
    kept = min(layers, layers + value + 1 if value <= 0 else value)
    if kept < 1:
        raise SeekVLError(f"{params.where}: select_layer {value} leaves none of the {layers} layers")
    return kept


def _sam(params: Section) -> SamConfig:
    """Return a SAM tower: the named preset, overridden by the keys beside it; its MLP is always four times as
    wide.
    """
    name = params.text("model_name")
    if name not in SAM_TOWERS:
        raise SeekVLError(
            f"{params.where}: model_name {name!r} is unknown; known are {', '.join(SAM_TOWERS)}"
        )
    params.must_be({"select_feature": "same", "select_layer": -1})
    preset = SAM_TOWERS[name]
    width = params.integer("width", preset.width)
    downsample = params.integers("downsample_channels", preset.downsample_channels)
    if len(downsample) != 2:
        raise SeekVLError(f"{params.where}: downsample_channels has {len(downsample)} values, expected 2")
    return SamConfig(
        image_size=params.integer("image_size", preset.image_size),
        patch_size=params.integer("patch_size", preset.patch_size),
        width=width,
        layers=params.integer("layers", preset.layers, most=DEEPEST),
        heads=params.integer("heads", preset.heads),
        mlp_width=4 * width,
        window=params.integer("window_size", preset.window),
        global_layers=params.integers("global_attn_indexes", preset.global_layers),
        neck_channels=params.integer("prompt_embed_dim", preset.neck_channels),
        downsample_channels=(downsample[0], downsample[1]),
        resize_side=params.integer("interpolate_size", preset.resize_side),
        pixel_mean=params.rgb("pixel_mean"),
        pixel_std=params.rgb("pixel_std"),
    )


def _adaptor(section: Section) -> AdaptorConfig:
    """Return the adaptor."""
    section.must_be({"cls": "MlpProjector"})
    section.finish(BOOKKEEPING | {"params": "read below"})
    params = section.section("params")
    kind = params.text("projector_type")
    if kind not in KINDS:
        raise SeekVLError(f"{params.where}: projector_type {kind!r} is unknown; known are {', '.join(KINDS)}")
    config = AdaptorConfig(
        kind=KINDS[kind],
        input_width=params.integer("input_dim"),
        width=params.integer("n_embed"),
        depth=params.integer("depth", 1),
    )
    params.finish({})
    return config


def write_official(config: VLConfig, *, dtype: str) -> dict[str, object]:
    """Return the `config.json` of the official layout for a model.

    Raises SeekVLError for what the layout cannot say.
    """
    if isinstance(config.vision, HybridConfig):
        params: dict[str, object] = {"concat_type": "tuple", "freeze_high": True, "freeze_low": True}
        params["high_res_cfg"] = _write_sam(config.vision.high)
        params["low_res_cfg"] = _write_siglip(config.vision.low) | {
            "ckpt_path": "",
            "output_dim": config.vision.low.width,
        }
        vision = {"cls": "HybridVisionTower", "model_type": "vision", "params": params}
    else:
        vision = {"cls": "CLIPVisionTower", "model_type": "vision", "params": _write_siglip(config.vision)}
    adaptor = config.adaptor
    return {
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {
                "depth": adaptor.depth,
                "input_dim": adaptor.input_width,
                "n_embed": adaptor.width,
                "projector_type": adaptor.kind,
            },
        },
        "architectures": ["MultiModalityCausalLM"],
        "language_config": write_llama(config.language) | {"torch_dtype": dtype},
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "vision_config": vision,
    }


def write_llama(config: LlamaConfig) -> dict[str, object]:
    """Return the language config, with every dimension spelled out."""
    values: dict[str, object] = {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "model_type": "llama",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
    }
    if config.norm_eps != 1e-6:
        values["rms_norm_eps"] = config.norm_eps
    if config.rope_theta != 10000.0:
        values["rope_theta"] = config.rope_theta
    return values


def _write_siglip(config: SiglipConfig) -> dict[str, object]:
    """Return the parameters of a SigLIP tower: the large preset and whatever differs from it."""
    name = "siglip_large_patch16_384"
    preset = SIGLIP_TOWERS[name]
    if config.gelu != preset.gelu or config.norm_eps != preset.norm_eps:
        raise SeekVLError(
            f"the official layout cannot say gelu {config.gelu!r} with norm_eps {config.norm_eps}: "
            f"it knows {preset.gelu!r} with {preset.norm_eps}; use the transformers layout"
        )
    params: dict[str, object] = {"image_size": config.image_size, "model_name": name}
    params |= {"select_feature": "same", "select_layer": -1}
    mine = {
        "width": config.width,
        "layers": config.layers,
        "heads": config.heads,
        "patch_size": config.patch_size,
    }
    theirs = {
        "width": preset.width,
        "layers": preset.layers,
        "heads": preset.heads,
        "patch_size": preset.patch_size,
    }
    params |= {key: value for key, value in mine.items() if value != theirs[key]}
    ratio = written_ratio(config, name=name)
    if ratio != MLP_RATIOS[name]:
        params["mlp_ratio"] = ratio
    return params | _write_norm(config)


def written_ratio(config: SiglipConfig, *, name: str) -> float:
    """Return the `mlp_ratio` that gives a tower's MLP width back: the preset's own where that does."""
    ratios = (MLP_RATIOS[name], config.mlp_width / config.width, (config.mlp_width + 0.5) / config.width)
    return next(ratio for ratio in ratios if int(config.width * ratio) == config.mlp_width)


def _write_sam(config: SamConfig) -> dict[str, object]:
    """Return the parameters of the SAM tower: the preset and whatever differs from it."""
    preset = SAM_TOWERS["sam_b_downsample"]
    if config.mlp_width != 4 * config.width or config.norm_eps != preset.norm_eps:
        raise SeekVLError(
            f"the official layout cannot say a SAM mlp_width of {config.mlp_width} with norm_eps "
            f"{config.norm_eps}: "
            f"it knows {4 * config.width} with {preset.norm_eps}"
        )
    values = {
        "width": (config.width, preset.width),
        "layers": (config.layers, preset.layers),
        "heads": (config.heads, preset.heads),
        "patch_size": (config.patch_size, preset.patch_size),
        "window_size": (config.window, preset.window),
        "global_attn_indexes": (list(config.global_layers), list(preset.global_layers)),
        "prompt_embed_dim": (config.neck_channels, preset.neck_channels),
        "downsample_channels": (list(config.downsample_channels), list(preset.downsample_channels)),
        "interpolate_size": (config.resize_side, preset.resize_side),
    }
    params: dict[str, object] = {
        "ckpt_path": "",
        "image_size": config.image_size,
        "model_name": "sam_b_downsample",
    }
    params |= {"output_dim": config.downsample_channels[1], "select_feature": "same", "select_layer": -1}
    params |= {key: mine for key, (mine, theirs) in values.items() if mine != theirs}
    return params | _write_norm(config)


def _write_norm(config: SiglipConfig | SamConfig) -> dict[str, object]:
    """Return mean and deviation where the tower applies them."""
    if config.pixel_mean is None or config.pixel_std is None:
        return {}
    return {"pixel_mean": list(config.pixel_mean), "pixel_std": list(config.pixel_std)}
