"""`config.json` and `processor_config.json` of DeepSeek-VL2, read and written.

The files were saved without the values that equal a default of the code which wrote them, so an absent key
means that default: the base model's 30 layers and 32 heads stand in no file. Two of those defaults are no
setting at all (`tile_tag`, `topk_method`); they come from the preset with the same dimensions, or are missed.
"""

import json

from seekvl.models.adaptor import AdaptorConfig, AdaptorKind
from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.mla import MlaConfig
from seekvl.models.moe import Choice, MoeConfig, Scoring
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl2 import Grid, VL2Config
from seekvl.presets import CHECKPOINTS, HALF, SIGLIP_TOWERS
from seekvl.processing.tile_image import TileImageConfig
from seekvl.runtime import SeekVLError
from seekvl.weights.official_config import BOOKKEEPING, MLP_RATIOS, written_ratio
from seekvl.weights.section import DEEPEST, Section

LANGUAGE_IGNORED = BOOKKEEPING | {
    "attention_dropout": "training only",
    "initializer_range": "training only",
    "use_cache": "how a library generates",
    "ep_size": "how a library spreads the experts over devices",
    "bos_token_id": "the tokenizer says",
    "eos_token_id": "the tokenizer says",
    "pad_token_id": "the tokenizer says",
    "lm_head": "no flag for tied weights, as its name may suggest: no code reads it",
    "rm_head": "no code reads it",
}
"""Keys of the language config that are ignored, each with its reason."""

LANGUAGE_FIXED: dict[str, object] = {
    "model_type": "deepseek_v2",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "rope_scaling": None,
}
"""What every published language model is; anything else would be another network."""

VISION_IGNORED = BOOKKEEPING | {
    "weight_init": "how a fresh tower is filled",
    "deterministic": "which kernels a library takes",
    "num_recomputing_layers": "training only",
    "use_checkpoint": "training only",
}
"""Keys of the vision config that are ignored, each with its reason."""

VISION_FIXED: dict[str, object] = {
    "model_type": "vision",
    "global_pool": "map",
    "ignore_head": True,
    "class_token": False,
    "num_classes": 0,
}
"""A tower whose patch tokens are taken and whose pooling head is left aside."""

TOWER = "siglip_so400m_patch14_384"
"""The tower of every published DeepSeek-VL2."""

PROCESSOR_IGNORED = {
    "processor_class": "the class a library would build",
    "auto_map": "remote code, which is never fetched or run",
    "add_special_token": "no code reads it",
    "mask_prompt": "which tokens are learnt is said where training is",
    "ignore_id": "which tokens are learnt is said where training is",
}
"""Keys of the processor config that are ignored, each with its reason."""

KINDS: dict[str, AdaptorKind] = {
    kind: kind for kind in ("identity", "linear", "mlp_gelu", "downsample_mlp_gelu")
}
MOE_KEYS = (
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "topk_method",
    "scoring_func",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "aux_loss_alpha",
    "seq_aux",
)
"""Keys that speak of experts, and say nothing where there are none."""

CHOICES: dict[str, Choice] = {
    "greedy": "greedy",
    "group_limited_greedy": "group_limited",
    "noaux_tc": "noaux_tc",
}
"""`topk_method` -> how experts are chosen; the default of the code that wrote the files is "gready", which is
none.
"""

SCORINGS: dict[str, Scoring] = {"softmax": "softmax", "sigmoid": "sigmoid"}


def read_vl2(config: Section) -> tuple[VL2Config, tuple[Grid, ...]]:
    """Return the model config of a `config.json` of DeepSeek-VL2, and the tile grids it lists.

    Raises SeekVLError for DeepSeek-OCR, whose files bear the same model_type, for unknown keys, and for
    switches that would make another network.
    """
    vision = _vision(config.section("vision_config"))
    section = config.section("language_config")
    preset = _published(section)
    language = _language(section, preset)
    adaptor = _adaptor(config.section("projector_config"))
    _check_tile_tag(config, preset)
    position = config.text("global_view_pos", "head")
    if position not in ("head", "tail"):
        raise SeekVLError(f"{config.where}: global_view_pos is {position!r}, expected 'head' or 'tail'")
    grids = read_grids(config, side=vision.image_size)
    config.must_be({"tie_word_embeddings": False})
    config.finish(BOOKKEEPING)
    model = VL2Config(vision=vision, adaptor=adaptor, language=language, global_first=position == "head")
    return model, grids


def read_tiling(processor: Section, model: VL2Config, *, grids: tuple[Grid, ...]) -> TileImageConfig:
    """Return the picture config of a `processor_config.json`, compared with what `config.json` says."""
    side = model.image_size
    if read_grids(processor, side=side) != grids:
        raise SeekVLError(
            f"{processor.where}: candidate_resolutions differ from those of config.json; which grid a "
            "picture gets would be a guess"
        )
    processor.must_be({"normalize": True})
    mean, std = processor.rgb("image_mean") or HALF, processor.rgb("image_std") or HALF
    patch = processor.integer("patch_size", model.vision.patch_size)
    ratio = processor.integer("downsample_ratio", model.adaptor.downsample)
    for key, said, built in (
        ("patch_size", patch, model.vision.patch_size),
        ("downsample_ratio", ratio, model.adaptor.downsample),
    ):
        if said != built:
            raise SeekVLError(
                f"{processor.where}: {key} is {said}, but config.json builds a network with {built}"
            )
    return TileImageConfig(
        image_size=side, grids=grids, patch_size=patch, downsample=ratio, mean=mean, std=std
    )


def read_grids(section: Section, *, side: int) -> tuple[Grid, ...]:
    """Return `candidate_resolutions`, pairs of width and height in px, as (columns, rows) of tiles.

    The reference takes the side of a tile from the first pair, which must therefore be a single tile.
    """
    sizes = section.pairs("candidate_resolutions")
    for width, height in sizes:
        if width % side or height % side:
            raise SeekVLError(
                f"{section.where}: candidate_resolutions has {width} x {height} px, which tiles of {side} px "
                "do not fill"
            )
    if sizes[0] != (side, side):
        raise SeekVLError(
            f"{section.where}: the first of candidate_resolutions is {sizes[0][0]} x {sizes[0][1]} px; it "
            f"must be one tile of the tower's {side} px"
        )
    return tuple((width // side, height // side) for width, height in sizes)


def _check_tile_tag(config: Section, preset: VL2Config | None) -> None:
    """Refuse another line-up of tiles than rows with newlines; only a published size may leave it out."""
    if preset is None and config.values.get("tile_tag") is None:
        raise SeekVLError(f"{config.where}: tile_tag is missing; the published files say '2D'")
    tag = config.text("tile_tag", "2D")
    if tag != "2D":
        raise SeekVLError(
            f"{config.where}: tile_tag is {tag!r}; only '2D' can be run, in the reference as well"
        )


def _published(section: Section) -> VL2Config | None:
    """Return the published size that has these dimensions, if one has."""
    for preset in CHECKPOINTS.values():
        model = preset.model
        if not isinstance(model, VL2Config) or model.language.moe is None:
            continue
        wanted = {
            "vocab_size": model.language.vocab_size,
            "hidden_size": model.language.width,
            "intermediate_size": model.language.mlp_width,
            "moe_intermediate_size": model.language.moe.width,
            "n_routed_experts": model.language.moe.experts,
        }
        if all(section.values.get(key) == value for key, value in wanted.items()):
            return model
    return None


def _language(section: Section, preset: VL2Config | None) -> DeepseekV2Config:
    """Return the language config; absent keys have the defaults of the code that wrote the file."""
    section.must_be(LANGUAGE_FIXED)
    heads = section.integer("num_attention_heads", 32)
    config = DeepseekV2Config(
        vocab_size=section.integer("vocab_size", 102400),
        width=section.integer("hidden_size", 4096),
        layers=section.integer("num_hidden_layers", 30, most=DEEPEST),
        heads=heads,
        kv_heads=section.integer("num_key_value_heads", heads),
        mlp_width=section.integer("intermediate_size", 11008),
        max_positions=section.integer("max_position_embeddings", 2048),
        norm_eps=section.number("rms_norm_eps", 1e-6),
        rope_theta=section.number("rope_theta", 10000.0),
        mla=_mla(section),
        moe=_moe(section, preset),
        dense_first=section.integer("first_k_dense_replace", 0),
        moe_every=section.integer("moe_layer_freq", 1),
    )
    section.finish(LANGUAGE_IGNORED)
    return config


def _mla(section: Section) -> MlaConfig | None:
    """Return the latent attention; None where `use_mla` is false, and its widths say nothing then."""
    widths = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    section.read |= {"q_lora_rank", *widths}
    if not section.flag("use_mla", True):
        return None
    if "q_lora_rank" not in section or section.values["q_lora_rank"] is not None:
        said = json.dumps(section.values.get("q_lora_rank", 1536))
        how = "is" if "q_lora_rank" in section else "is missing, which means"
        raise SeekVLError(
            f"{section.where}: q_lora_rank {how} {said}: queries of low rank, which no DeepSeek-VL2 has; "
            "the published files say null"
        )
    for key in widths:
        if key in section and section.values[key] is None:
            raise SeekVLError(f"{section.where}: {key} is null, but use_mla is true")
    return MlaConfig(
        kv_rank=section.integer("kv_lora_rank", 512),
        nope_width=section.integer("qk_nope_head_dim", 128),
        rope_width=section.integer("qk_rope_head_dim", 64),
        value_width=section.integer("v_head_dim", 128),
    )


def _moe(section: Section, preset: VL2Config | None) -> MoeConfig | None:
    """Return the mixture of experts; None for a model without routed experts."""
    if section.values.get("n_routed_experts") is None:
        section.read |= set(MOE_KEYS)
        return None
    default = None
    if preset is not None and preset.language.moe is not None:
        default = _method(preset.language.moe)
    choice, scoring = section.text("topk_method", default), section.text("scoring_func", "softmax")
    for key, said, known in (("topk_method", choice, CHOICES), ("scoring_func", scoring, SCORINGS)):
        if said not in known:
            raise SeekVLError(f"{section.where}: {key} {said!r} is unknown; known are {', '.join(known)}")
    return MoeConfig(
        experts=section.integer("n_routed_experts"),
        active=section.integer("num_experts_per_tok"),
        shared=section.integer("n_shared_experts", 0),
        width=section.integer("moe_intermediate_size", 1407),
        scoring=SCORINGS[scoring],
        choice=CHOICES[choice],
        groups=section.integer("n_group", 1),
        kept_groups=section.integer("topk_group", 1),
        normalise=section.flag("norm_topk_prob", False),
        scale=section.number("routed_scaling_factor", 1.0),
        aux_alpha=section.number("aux_loss_alpha", 0.001),
        aux_per_sequence=section.flag("seq_aux", True),
    )


def _method(config: MoeConfig) -> str:
    """Return the published name of a way of choosing experts."""
    return next(name for name, choice in CHOICES.items() if choice == config.choice)


def _vision(section: Section) -> SiglipConfig:
    """Return the tower: built from the numbers; those of the named one fill in what is left out."""
    name = section.text("model_name")
    if name.startswith("deeplip"):
        raise SeekVLError(
            f"{section.where}: model_name {name!r} is the tower of DeepSeek-OCR, whose files bear the "
            "model_type of DeepSeek-VL2: use its own repository"
        )
    if name not in SIGLIP_TOWERS:
        raise SeekVLError(
            f"{section.where}: model_name {name!r} is unknown; DeepSeek-VL2 has siglip_so400m_patch14_384"
        )
    section.must_be(VISION_FIXED)
    preset = SIGLIP_TOWERS[name]
    width = section.integer("width", preset.width)
    config = SiglipConfig(
        image_size=section.integer("image_size", preset.image_size),
        patch_size=section.integer("patch_size", preset.patch_size),
        width=width,
        layers=section.integer("layers", preset.layers, most=DEEPEST),
        heads=section.integer("heads", preset.heads),
        mlp_width=int(width * section.number("mlp_ratio", MLP_RATIOS[name])),
        gelu="tanh",
    )
    section.finish(VISION_IGNORED)
    return config


def _adaptor(section: Section) -> AdaptorConfig:
    """Return the adaptor."""
    section.must_be({"model_type": "mlp_projector"})
    kind = section.text("projector_type", "downsample_mlp_gelu")
    if kind not in KINDS:
        raise SeekVLError(
            f"{section.where}: projector_type {kind!r} is unknown; known are {', '.join(KINDS)}"
        )
    ratio, hidden = section.integer("downsample_ratio", 2), section.integer("mlp_ratio", 1)
    windows = kind == "downsample_mlp_gelu"  # the others have neither ratio, whatever the file says
    config = AdaptorConfig(
        kind=KINDS[kind],
        input_width=section.integer("input_dim", 1152),
        width=section.integer("n_embed", 2048),
        depth=section.integer("depth", 2),
        downsample=ratio if windows else 1,
        mlp_ratio=hidden if windows else 1,
        token_pooling=section.flag("token_pooling", False),
    )
    section.finish(BOOKKEEPING)
    return config


def write_vl2(config: VL2Config, *, grids: tuple[Grid, ...], dtype: str) -> dict[str, object]:
    """Return the `config.json` of the official layout for a model, with every dimension spelled out.

    Raises SeekVLError for what the layout cannot say.
    """
    vision, adaptor = config.vision, config.adaptor
    if (vision.gelu, vision.norm_eps, vision.pixel_mean) != ("tanh", 1e-6, None):
        raise SeekVLError(
            f"the official layout of DeepSeek-VL2 cannot say a tower with gelu {vision.gelu!r}, norm_eps "
            f"{vision.norm_eps} and pixel_mean {vision.pixel_mean}: it knows 'tanh', 1e-06 and None"
        )
    return {
        "candidate_resolutions": write_grids(grids, side=config.image_size),
        "global_view_pos": "head" if config.global_first else "tail",
        "language_config": _write_language(config.language) | {"torch_dtype": dtype},
        "model_type": "deepseek_vl_v2",
        "projector_config": {
            "depth": adaptor.depth,
            "downsample_ratio": adaptor.downsample,
            "input_dim": adaptor.input_width,
            "mlp_ratio": adaptor.mlp_ratio,
            "model_type": "mlp_projector",
            "n_embed": adaptor.width,
            "projector_type": adaptor.kind,
            "token_pooling": adaptor.token_pooling,
        },
        "tile_tag": "2D",
        "torch_dtype": dtype,
        "vision_config": {
            "heads": vision.heads,
            "image_size": vision.image_size,
            "layers": vision.layers,
            "mlp_ratio": written_ratio(vision, name=TOWER),
            "model_name": TOWER,
            "model_type": "vision",
            "patch_size": vision.patch_size,
            "width": vision.width,
        },
    }


def write_grids(grids: tuple[Grid, ...], *, side: int) -> list[list[int]]:
    """Return tile grids as `candidate_resolutions`: pairs of width and height in px."""
    return [[columns * side, rows * side] for columns, rows in grids]


def _write_language(config: DeepseekV2Config) -> dict[str, object]:
    """Return the language config."""
    values: dict[str, object] = {
        "first_k_dense_replace": config.dense_first,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "model_type": "deepseek_v2",
        "moe_layer_freq": config.moe_every,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "q_lora_rank": None,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_mla": config.mla is not None,
        "vocab_size": config.vocab_size,
    }
    if config.mla is None:
        values |= {"kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
    else:
        values |= {
            "kv_lora_rank": config.mla.kv_rank,
            "qk_nope_head_dim": config.mla.nope_width,
            "qk_rope_head_dim": config.mla.rope_width,
            "v_head_dim": config.mla.value_width,
        }
    return values if config.moe is None else values | _write_moe(config.moe)


def _write_moe(config: MoeConfig) -> dict[str, object]:
    """Return what the language config says about the mixture of experts."""
    return {
        "aux_loss_alpha": config.aux_alpha,
        "moe_intermediate_size": config.width,
        "n_group": config.groups,
        "n_routed_experts": config.experts,
        "n_shared_experts": config.shared or None,
        "norm_topk_prob": config.normalise,
        "num_experts_per_tok": config.active,
        "routed_scaling_factor": config.scale,
        "scoring_func": config.scoring,
        "seq_aux": config.aux_per_sequence,
        "topk_group": config.kept_groups,
        "topk_method": _method(config),
    }
