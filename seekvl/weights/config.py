"""A checkpoint folder's config files, of either family and layout, as one config.

Pixels must be normalised exactly once. The official files say it in two places, the processor
(`do_normalize`) and the towers (`pixel_mean`), and only one of them may. The transformers files always
normalise in the processor; here the towers do it instead, so that every preprocessing mode fits every
checkpoint. In DeepSeek-VL2 the processor does, always.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from seekvl.models.hybrid import HybridConfig
from seekvl.models.quantized import KINDS, Kind
from seekvl.models.vl import VLConfig
from seekvl.models.vl2 import AnyConfig
from seekvl.presets import TRAINED_TOKENS
from seekvl.processing.pad_image import PadImageConfig, visual_tokens
from seekvl.processing.template import DEEPSEEK_VL2, DEFAULT_SYSTEM, Template
from seekvl.processing.tile_image import TileImageConfig
from seekvl.processing.tokenizer import BOS, EOS, GROUNDING_MARKS, IMAGE, VL2_IMAGE, VL2_PAD
from seekvl.runtime import DTYPES, SeekVLError
from seekvl.weights.official_config import read_official
from seekvl.weights.official_vl2_config import PROCESSOR_IGNORED, read_tiling, read_vl2
from seekvl.weights.section import Section
from seekvl.weights.transformers_config import Norm, read_transformers, with_norm

Layout = Literal["official", "transformers"]

VL2 = "deepseek_vl_v2"
"""model_type of DeepSeek-VL2, and of DeepSeek-OCR, which is refused by its tower."""

LAYOUTS: dict[str, Layout] = {
    "multi_modality": "official",
    VL2: "official",
    "deepseek_vl": "transformers",
    "deepseek_vl_hybrid": "transformers",
}
"""model_type -> layout."""

QUANT_METHOD, QUANT_VERSION = "seekvl", 1
"""Who quantised a checkpoint, and the version of its format, see docs/quantization.md."""

OTHERS = {
    "deepseekocr": "DeepSeek-OCR: use its own repository",
    "deepseek_ocr": "DeepSeek-OCR: use its own repository",
    "janus": "Janus, which generates pictures too: use transformers",
    "llava": "LLaVA: use transformers",
    "llava_next": "LLaVA-NeXT: use transformers",
    "llama": "a language model without vision: use transformers",
    "qwen2_vl": "Qwen2-VL: use transformers",
    "siglip": "a SigLIP model alone: use transformers",
}
"""Other model types that people have on disk -> what they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """The control tokens of a tokenizer, as strings; their ids are looked up."""

    bos: str = BOS
    eos: str = EOS
    image: str = IMAGE
    pad: str | None = None
    """None: the end token pads, as in the reference."""
    added: tuple[str, ...] = ()
    """Given to a tokenizer that lacks them, in this order, as the processor of DeepSeek-VL2 does."""


VL2_TOKENS = SpecialTokens(image=VL2_IMAGE, pad=VL2_PAD)
"""The control tokens of DeepSeek-VL2 where its files name no others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Everything a checkpoint folder says besides its numbers."""

    model: AnyConfig
    image: PadImageConfig | TileImageConfig
    template: Template
    specials: SpecialTokens = SpecialTokens()
    layout: Layout = "official"
    dtype: torch.dtype | None = None
    """Dtype of the stored weights, as the config has it; None where it does not say."""
    image_id: int | None = None
    """Image token id, as the config has it; None in the official layout."""
    max_tokens: int = TRAINED_TOKENS
    """Context the checkpoint was trained for, tokens; `model.language.max_positions` is what it could hold.
    """
    quantization: Kind | None = None
    """Format of the language model's matrices, as the config has it; None for a plain checkpoint."""


def read_config(folder: Path) -> CheckpointConfig:
    """Read the config files of a checkpoint folder.

    Raises SeekVLError for another model type, missing or broken files, unknown keys that may change the
    network, values that contradict each other, and pixels that would be normalised twice or never.
    """
    config = Section.of_file(folder / "config.json")
    model_type = config.text("model_type")
    if model_type not in LAYOUTS:
        known = OTHERS.get(model_type.lower(), f"known are {', '.join(LAYOUTS)}")
        raise SeekVLError(f"{config.where}: model_type {model_type!r} is not DeepSeek-VL: {known}")
    quantization = _quantization(config)
    if model_type == VL2:
        return replace(_read_vl2(folder, config), quantization=quantization)
    layout = LAYOUTS[model_type]
    dtype = _dtype(config)
    processor = _optional(folder / "processor_config.json")
    if layout == "official":
        if processor is None:
            raise SeekVLError(f"{folder} has no processor_config.json: download the whole checkpoint folder")
        image_id = None
        model = read_official(config)
        image = _official_image(Section.of_file(folder / "preprocessor_config.json"), model)
    else:
        image_id = config.integer("image_token_id", 100015)
        model, image = _transformers_image(_picture_section(folder, processor), read_transformers(config))
    specials = _specials(folder, processor, published=SpecialTokens())
    template = _template(processor, specials)
    _check_slots(processor, image)
    return CheckpointConfig(
        model=model,
        image=image,
        template=template,
        specials=specials,
        layout=layout,
        dtype=dtype,
        image_id=image_id,
        max_tokens=min(TRAINED_TOKENS, model.language.max_positions),
        quantization=quantization,
    )


def quantization_section(kind: Kind) -> dict[str, object]:
    """Return what `config.json` says of a quantised checkpoint, under `quantization_config`."""
    return {"quant_method": QUANT_METHOD, "version": QUANT_VERSION, "format": kind}


def _quantization(config: Section) -> Kind | None:
    """Return the format of a quantised checkpoint, None for a plain one.

    Raises SeekVLError for quantisation by another program, which is not read, and for a later version.
    """
    section = config.section_if_any("quantization_config")
    if section is None:
        return None
    method = section.text("quant_method")
    if method != QUANT_METHOD:
        raise SeekVLError(
            f"{section.where}: quant_method {method!r} is another program's; take the checkpoint it was made "
            "from, and quantise it with 'seekvl convert --quantize int4'"
        )
    version, kind = section.integer("version"), section.text("format")
    if version != QUANT_VERSION:
        raise SeekVLError(
            f"{section.where}: version {version} of the format; this seekvl reads version {QUANT_VERSION}"
        )
    section.finish({})
    for known in KINDS:
        if kind == known:
            return known
    raise SeekVLError(f"{section.where}: format {kind!r} is unknown; known are {', '.join(KINDS)}")


def _read_vl2(folder: Path, config: Section) -> CheckpointConfig:
    """Read the config files of DeepSeek-VL2."""
    dtype = _dtype(config)
    model, grids = read_vl2(config)
    processor = Section.of_file(folder / "processor_config.json")
    image = read_tiling(processor, model, grids=grids)
    specials = _specials(folder, processor, published=VL2_TOKENS)
    _require_format(processor)
    processor.finish(PROCESSOR_IGNORED)
    template = replace(
        DEEPSEEK_VL2,
        separators=(DEEPSEEK_VL2.separators[0], specials.eos),
        picture=specials.image,
    )
    marks = (*GROUNDING_MARKS, template.user, template.assistant)
    return CheckpointConfig(
        model=model,
        image=image,
        template=template,
        specials=replace(specials, added=(specials.pad or specials.eos, specials.image, *marks)),
        dtype=dtype,
        max_tokens=min(TRAINED_TOKENS, model.language.max_positions),
    )


def _optional(path: Path) -> Section | None:
    """Open a file that need not exist."""
    return Section.of_file(path) if path.exists() else None


def _dtype(config: Section) -> torch.dtype | None:
    """Return the stored dtype a config names, under its newer or its older key."""
    for key in ("dtype", "torch_dtype"):
        if key in config:
            name = config.text(key)
            if name not in DTYPES:
                raise SeekVLError(f"{config.where}: {key} {name!r} is unknown; known are {', '.join(DTYPES)}")
            return DTYPES[name]
    return None


def _official_image(section: Section, model: VLConfig) -> PadImageConfig:
    """Return the picture config of the official layout, after settling who normalises."""
    normalize = section.flag("do_normalize", True)
    low = model.vision.low if isinstance(model.vision, HybridConfig) else model.vision
    high = model.vision.high if isinstance(model.vision, HybridConfig) else low
    inside = [tower.pixel_mean is not None for tower in {id(high): high, id(low): low}.values()]
    if normalize and any(inside):
        raise SeekVLError(
            f"{section.where}: pixels would be normalised twice: do_normalize is true, and the vision "
            "config has pixel_mean"
        )
    if not normalize and not all(inside):
        raise SeekVLError(
            f"{section.where}: pixels would never be normalised: do_normalize is false, and a vision tower "
            "has no pixel_mean"
        )
    if normalize and isinstance(model.vision, HybridConfig):
        raise SeekVLError(
            f"{section.where}: do_normalize is true, but a model of two towers makes its low-resolution "
            "picture from "
            "un-normalised pixels; set it to false and give each tower its pixel_mean and pixel_std"
        )
    mean, std = section.rgb("image_mean"), section.rgb("image_std")
    if mean is None or std is None:
        raise SeekVLError(f"{section.where}: image_mean or image_std is missing")
    colour = tuple(int(value * 255) for value in mean)
    if section.integers("background_color", colour) != colour:
        raise SeekVLError(
            f"{section.where}: background_color {section.values['background_color']} differs from the "
            f"{list(colour)} "
            "of image_mean, with which the reference pads"
        )
    _same_size(section, section.integer("image_size"), model.image_size)
    hybrid = isinstance(model.vision, HybridConfig)
    return PadImageConfig(
        image_size=model.image_size,
        patch_slots_side=low.grid,
        min_size=section.integer("min_size", 14),
        mean=high.pixel_mean or mean,
        std=high.pixel_std or std,
        do_normalize=normalize,
        background=(colour[0], colour[1], colour[2]),
        rescale_factor=section.number("rescale_factor", 1 / 255),
        low_size=low.image_size if hybrid else None,
        low_mean=low.pixel_mean or mean,
        low_std=low.pixel_std or std,
    )


def _picture_section(folder: Path, processor: Section | None) -> Section:
    """Return where the transformers layout describes pictures: a file of its own, or a part of the
    processor's.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists() and processor is not None and "image_processor" in processor:
        return processor.section("image_processor")
    return Section.of_file(path)


def _transformers_image(section: Section, model: VLConfig) -> tuple[VLConfig, PadImageConfig]:
    """Return model and picture config of the transformers layout, with the normalisation moved into the
    towers.
    """
    section.must_be({"do_resize": True, "do_rescale": True, "do_pad": True})
    if not section.flag("do_normalize", True):
        raise SeekVLError(f"{section.where}: pixels would never be normalised: do_normalize is false")
    low = _norm(section, prefix="")
    high: Norm | None = None
    prefix = ""
    if isinstance(model.vision, HybridConfig):
        prefix = "high_res_"
        high = _norm(section, prefix=prefix)
        _same_size(section, _side(section, "size"), model.vision.low.image_size)
        if section.integer("resample", 3) != 2:
            raise SeekVLError(
                f"{section.where}: resample is {section.integer('resample', 3)}; the low-resolution picture "
                "was made with "
                "2 (bilinear) when these models were trained"
            )
    section.must_be({f"{prefix}resample": 3})
    _same_size(section, _side(section, f"{prefix}size"), model.image_size)
    model = with_norm(model, high=high, low=low)
    mean, std = high or low
    colour = section.integers(f"{prefix}background_color", tuple(int(value * 255) for value in mean))
    if len(colour) != 3 or max(colour) > 255:
        raise SeekVLError(
            f"{section.where}: {prefix}background_color {list(colour)} is not three values of 0..255"
        )
    hybrid = isinstance(model.vision, HybridConfig)
    return model, PadImageConfig(
        image_size=model.image_size,
        patch_slots_side=math.isqrt(model.visual_tokens),
        min_size=section.integer("min_size", 14),
        mean=mean,
        std=std,
        background=(colour[0], colour[1], colour[2]),
        rescale_factor=section.number("rescale_factor", 1 / 255),
        low_size=_side(section, "size") if hybrid else None,
        low_mean=low[0],
        low_std=low[1],
    )


def _norm(section: Section, *, prefix: str) -> Norm:
    """Return mean and deviation."""
    mean, std = section.rgb(f"{prefix}image_mean"), section.rgb(f"{prefix}image_std")
    if mean is None or std is None:
        raise SeekVLError(f"{section.where}: {prefix}image_mean or {prefix}image_std is missing")
    return mean, std


def _side(section: Section, key: str) -> int:
    """Return the side of a square given as a number or as height and width, px."""
    if not isinstance(section.values.get(key), dict):
        return section.integer(key)
    size = section.section(key)
    height, width = size.integer("height"), size.integer("width")
    if height != width:
        raise SeekVLError(f"{size.where}: {width} x {height} px is no square")
    return height


def _same_size(section: Section, said: int, built: int) -> None:
    """Refuse a picture side that the vision tower is not built for."""
    if said != built:
        raise SeekVLError(
            f"{section.where}: pictures of {said} px, but config.json builds a tower for {built} px"
        )


def _check_slots(processor: Section | None, image: PadImageConfig) -> None:
    """Refuse a number of visual tokens that the towers do not make."""
    if processor is None:
        return
    said, made = processor.integer("num_image_tokens", visual_tokens(image)), visual_tokens(image)
    if said != made:
        raise SeekVLError(
            f"{processor.where}: num_image_tokens is {said}, but the vision config makes {made} rows of a "
            "picture"
        )
    if processor.flag("add_special_token", False):
        raise SeekVLError(
            f"{processor.where}: add_special_token is true: the image tag would stay beside its tokens and "
            "leave more slots "
            "than features; published checkpoints have false"
        )


def _template(processor: Section | None, specials: SpecialTokens) -> Template:
    """Return the prompt format of DeepSeek-VL."""
    system = DEFAULT_SYSTEM
    if processor is not None:
        _require_format(processor)
        system = processor.text("system_prompt", DEFAULT_SYSTEM)
    return Template(separators=("\n\n", specials.eos), picture=specials.image, system=system)


def _require_format(processor: Section) -> None:
    """Refuse another prompt format than that of the published checkpoints, which bears one name in both
    families.
    """
    name = processor.text("sft_format", "deepseek")
    if name != "deepseek":
        raise SeekVLError(f"sft_format {name!r} is unknown: published checkpoints use 'deepseek'")


def _specials(folder: Path, processor: Section | None, *, published: SpecialTokens) -> SpecialTokens:
    """Return the control tokens as the tokenizer's and the processor's files name them, else as published."""
    names: dict[str, str] = {}
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        section = _optional(path)
        if section is None:
            continue
        for role in ("bos", "eos", "pad", "image"):
            value = section.values.get(f"{role}_token")
            if isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if not isinstance(value, str) or not value:
                raise SeekVLError(f"{section.where}: {role}_token is {value!r}, expected a string")
            if names.setdefault(role, value) != value:
                raise SeekVLError(
                    f"{folder}: {role}_token is {names[role]!r} in tokenizer_config.json and {value!r} in "
                    f"{path.name}"
                )
    if processor is not None:
        for key in ("image_tag", "image_token"):
            if key in processor:
                names["image"] = processor.text(key)
        if "pad_token" in processor:
            names.setdefault("pad", processor.text("pad_token"))
    return replace(
        published,
        bos=names.get("bos", published.bos),
        eos=names.get("eos", published.eos),
        image=names.get("image", published.image),
        pad=names.get("pad", published.pad),
    )
