"""A network and its processor written as a checkpoint folder, in either layout of DeepSeek-VL or in the one
of DeepSeek-VL2.

Each file appears whole or not at all, `config.json` last: a folder without it is not finished. Tensors that
the network does not use are left out, which other loaders of these layouts accept; whoever has them can pass
them on.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from seekvl.models.hybrid import HybridConfig
from seekvl.models.quantized import quantized_modules
from seekvl.models.vl import VLConfig
from seekvl.models.vl2 import AnyVL
from seekvl.processing.pad_image import PadImageConfig, visual_tokens
from seekvl.processing.template import DEFAULT_SYSTEM
from seekvl.processing.tile_image import TileImageConfig
from seekvl.runtime import DTYPES, SeekVLError, atomic_file
from seekvl.weights.config import CheckpointConfig, Layout, SpecialTokens
from seekvl.weights.key_map import KeyMap, parameter_shapes
from seekvl.weights.load import layout_map, open_tokenizer
from seekvl.weights.official_config import write_official
from seekvl.weights.official_vl2_config import write_grids, write_vl2
from seekvl.weights.read import INDEX, SINGLE, require_finite
from seekvl.weights.transformers_config import write_transformers

SHARD_BYTES = 5_000_000_000
"""Default size above which weights are split, as in the published 7B."""


def save_checkpoint(
    model: AnyVL,
    folder: Path,
    *,
    config: CheckpointConfig,
    tokenizer: Path,
    layout: Layout | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    unused: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder.

    `config` is that of the loaded checkpoint, or describes a model made here; `tokenizer` is a
    `tokenizer.json`. `layout` and `dtype` default to those of the config and of the weights. `unused` are
    tensors of the target layout that its map lists as unused. Raises SeekVLError for a layout that cannot
    hold the model, for weights that are not finite or do not fit the dtype, and for a folder that already has
    a checkpoint, unless `overwrite`.
    """
    if model.config != config.model:
        raise SeekVLError("the config given describes another model than the one to save")
    if quantized_modules(model):
        raise SeekVLError(
            "this model is quantised, and no layout holds that: convert the checkpoint it was made from with "
            "'seekvl convert --quantize', or save that one"
        )
    config = replace(config, layout=layout or config.layout, quantization=None)
    dtype = dtype or model.language.norm.weight.dtype
    names = {value: name for name, value in DTYPES.items()}
    if dtype not in names:
        raise SeekVLError(f"weights are saved as {', '.join(DTYPES)}, not {dtype}")
    if shard_bytes < 1:
        raise SeekVLError(f"shard_bytes must be at least 1, not {shard_bytes}")
    key_map = layout_map(config)
    surplus = [key for key in unused or {} if key not in key_map.unused]
    if surplus:
        raise SeekVLError(f"{surplus[0]} is not among the unused tensors of the {config.layout} layout")
    texts = config_files(config, tokenizer, dtype=names[dtype])
    old = old_files(folder, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    written = _write_weights(
        model, folder, key_map=key_map, dtype=dtype, shard_bytes=shard_bytes, unused=unused or {}
    )
    for path in old:
        if path.name not in written:
            path.unlink()
    write_config_files(folder, texts, tokenizer=tokenizer)


def write_config_files(folder: Path, texts: Mapping[str, Mapping[str, object]], *, tokenizer: Path) -> None:
    """Write the tokenizer and the JSON files of a folder in their order: `config.json` stands last."""
    with atomic_file(folder / "tokenizer.json") as part:
        shutil.copyfile(tokenizer, part)
    for name, values in texts.items():
        write_json(folder / name, values)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write an object as a JSON file that appears whole."""
    with atomic_file(path) as part:
        part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def old_files(folder: Path, *, overwrite: bool) -> list[Path]:
    """Return the weight files of a checkpoint that stands in the folder, which must be allowed to go."""
    if folder.exists() and not folder.is_dir():
        raise SeekVLError(f"cannot save to {folder}: it is a file")
    old = [path for pattern in ("*.safetensors", INDEX) for path in folder.glob(pattern)]
    if (old or (folder / "config.json").exists()) and not overwrite:
        raise SeekVLError(
            f"{folder} already holds a checkpoint: choose another folder, or overwrite it on purpose"
        )
    return old


def _write_weights(
    model: AnyVL,
    folder: Path,
    *,
    key_map: KeyMap,
    dtype: torch.dtype,
    shard_bytes: int,
    unused: Mapping[str, Tensor],
) -> set[str]:
    """Write the weights, in shards where they are larger than one; return the names of the files."""
    sizes = dict(_sizes(model, key_map, unused, itemsize=dtype.itemsize))
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    state = model.state_dict()
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: _published(key, state, key_map, unused, dtype=dtype) for key in keys}
        with atomic_file(folder / name) as part:
            save_file(tensors, part, metadata={"format": "pt"})
        del tensors
    if count == 1:
        return {SINGLE}
    places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})
    return {*names, INDEX}


def _sizes(
    model: AnyVL, key_map: KeyMap, unused: Mapping[str, Tensor], *, itemsize: int
) -> Iterator[tuple[str, int]]:
    """Yield published key and bytes, sorted by key."""
    shapes = parameter_shapes(model)
    for key in sorted([*key_map.targets, *unused]):
        if key in unused:
            yield key, unused[key].numel() * itemsize
        else:
            target = key_map.targets[key]
            yield key, math.prod(target.shape(shapes[target.parameter])) * itemsize


def _published(
    key: str,
    state: Mapping[str, Tensor],
    key_map: KeyMap,
    unused: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return a tensor as it is published, in memory of its own where it is a part of one of ours."""
    if key in unused:
        source = unused[key].detach()
    else:
        target = key_map.targets[key]
        source = target.of(state[target.parameter].detach())
        if target.partial:
            source = source.clone()
    tensor = source.to(device="cpu", dtype=dtype).contiguous()
    require_finite(tensor, key=key, source=source)
    return tensor


def config_files(config: CheckpointConfig, tokenizer: Path, *, dtype: str) -> dict[str, Mapping[str, object]]:
    """Return the JSON files of the layout by name, the config last; checks that the tokenizer is one."""
    specials = config.specials
    if not tokenizer.is_file():
        raise SeekVLError(f"there is no tokenizer {tokenizer}")
    loaded = open_tokenizer(tokenizer, config)
    model, image = config.model, config.image
    if not isinstance(model, VLConfig):
        assert isinstance(image, TileImageConfig)
        return {
            "special_tokens_map.json": _special_tokens(specials),
            "tokenizer_config.json": _tokenizer_config(config) | {"tokenizer_class": "LlamaTokenizerFast"},
            "processor_config.json": _vl2_processor(image, specials, name=config.template.name),
            "config.json": write_vl2(model, grids=image.grids, dtype=dtype),
        }
    assert isinstance(image, PadImageConfig)
    if config.layout == "official":
        return {
            "special_tokens_map.json": _special_tokens(specials)
            | {"additional_special_tokens": [specials.image]},
            "tokenizer_config.json": _tokenizer_config(config) | {"tokenizer_class": "LlamaTokenizerFast"},
            "preprocessor_config.json": _official_image(image),
            "processor_config.json": _official_processor(config, slots=visual_tokens(image)),
            "config.json": write_official(model, dtype=dtype),
        }
    hybrid = isinstance(model.vision, HybridConfig)
    return {
        "tokenizer_config.json": _tokenizer_config(config)
        | {"image_token": specials.image, "tokenizer_class": "PreTrainedTokenizerFast"},
        "preprocessor_config.json": _transformers_image(image),
        "processor_config.json": {
            "num_image_tokens": visual_tokens(image),
            "processor_class": "DeepseekVLHybridProcessor" if hybrid else "DeepseekVLProcessor",
        },
        "config.json": write_transformers(
            model,
            dtype=dtype,
            image_id=loaded.image_id,
            bos_id=loaded.bos_id,
            eos_id=loaded.eos_id,
        ),
    }


def _special_tokens(specials: SpecialTokens) -> dict[str, object]:
    """Return the control tokens by role; the end token pads where nothing else does."""
    return {"bos_token": specials.bos, "eos_token": specials.eos, "pad_token": specials.pad or specials.eos}


def _tokenizer_config(config: CheckpointConfig) -> dict[str, object]:
    """Return what both layouts say about the tokenizer."""
    return _special_tokens(config.specials) | {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.model.language.max_positions,
    }


def _official_image(image: PadImageConfig) -> dict[str, object]:
    """Return the preprocessor config of the official layout."""
    return {
        "background_color": list(image.pad_colour),
        "do_normalize": image.do_normalize,
        "image_mean": list(image.mean),
        "image_processor_type": "VLMImageProcessor",
        "image_size": image.image_size,
        "image_std": list(image.std),
        "min_size": image.min_size,
        "processor_class": "VLChatProcessor",
        "rescale_factor": image.rescale_factor,
    }


def _official_processor(config: CheckpointConfig, *, slots: int) -> dict[str, object]:
    """Return the processor config of the official layout; another default system prompt is an extra key."""
    values: dict[str, object] = {
        "add_special_token": False,
        "ignore_id": -100,
        "image_tag": config.specials.image,
        "mask_prompt": True,
        "num_image_tokens": slots,
        "processor_class": "VLChatProcessor",
        "sft_format": config.template.name,
    }
    if config.template.system != DEFAULT_SYSTEM:
        values["system_prompt"] = config.template.system
    return values


def _vl2_processor(image: TileImageConfig, specials: SpecialTokens, *, name: str) -> dict[str, object]:
    """Return the processor config of DeepSeek-VL2, which describes pictures and prompt in one."""
    return {
        "add_special_token": False,
        "candidate_resolutions": write_grids(image.grids, side=image.image_size),
        "downsample_ratio": image.downsample,
        "ignore_id": -100,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "image_token": specials.image,
        "mask_prompt": False,
        "normalize": True,
        "pad_token": specials.pad,
        "patch_size": image.patch_size,
        "processor_class": "DeepseekVLV2Processor",
        "sft_format": name,
    }


def _transformers_image(image: PadImageConfig) -> dict[str, object]:
    """Return the preprocessor config of the transformers layout, where the processor normalises."""
    values: dict[str, object] = {"do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True}
    values |= {"min_size": image.min_size, "rescale_factor": image.rescale_factor}
    square = {"height": image.image_size, "width": image.image_size}
    large = {
        "background_color": list(image.pad_colour),
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "resample": 3,
        "size": square,
    }
    if image.low_size is None:
        return values | large | {"image_processor_type": "DeepseekVLImageProcessor"}
    values |= {f"high_res_{key}": value for key, value in large.items()}
    return values | {
        "background_color": [int(value * 255) for value in image.low_mean],
        "image_mean": list(image.low_mean),
        "image_processor_type": "DeepseekVLHybridImageProcessor",
        "image_std": list(image.low_std),
        "resample": 2,
        "size": {"height": image.low_size, "width": image.low_size},
    }
