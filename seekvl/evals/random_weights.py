"""Checkpoints without a download: random weights at the true dimensions of a published model.

They measure what real weights would, for a dense network: speed does not depend on numbers. In a mixture of
experts a random router spreads the tokens about evenly.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from seekvl.engine.budget import free_bytes
from seekvl.models.cost import parameters
from seekvl.models.quantized import Kind
from seekvl.models.vl2 import AnyVL, VL2Config, on_meta
from seekvl.presets import Preset
from seekvl.processing.tokenizer import VL2_ADDED
from seekvl.runtime import SeekVLError, seed_for
from seekvl.weights.config import VL2_TOKENS, CheckpointConfig, SpecialTokens, read_config
from seekvl.weights.load import BUNDLED, NANO, load_checkpoint
from seekvl.weights.save import save_checkpoint
from seekvl.weights.save_quantized import save_quantized
from seekvl.weights.self_check import SELFCHECK

TOKENIZERS = {
    False: BUNDLED[NANO] / "tokenizer.json",
    True: SELFCHECK / "vl2-small-like" / "tokenizer.json",
}
"""Small tokenizers that ship with the package, by whether the model is a DeepSeek-VL2."""

SPECIALS = {False: SpecialTokens(), True: replace(VL2_TOKENS, added=VL2_ADDED)}
"""Their control tokens; those of DeepSeek-VL2 are added to what the file holds."""


def write_random(preset: Preset, folder: Path, *, tokenizer: Path | None = None) -> None:
    """Write random bfloat16 weights: DeepSeek-VL in the transformers layout, DeepSeek-VL2 in the official
    one.

    tokenizer: a `tokenizer.json`; by default a small one of the package. Its words are not the published
    ones, the network's vocabulary is.

    Raises SeekVLError where memory or disk cannot hold the weights, and for a folder that has a checkpoint.
    """
    tiled = isinstance(preset.model, VL2Config)
    size = sum(parameters(preset.model).values()) * torch.bfloat16.itemsize
    _check_room(size, folder)
    model = random_network(preset, device=torch.device("cpu"))
    save_checkpoint(model, folder, config=random_config(preset), tokenizer=tokenizer or TOKENIZERS[tiled])


def random_network(preset: Preset, *, device: torch.device) -> AnyVL:
    """Make a network in bfloat16 on a device, with random weights: the same ones on every CPU."""
    model = on_meta(preset.model).to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed_for(0, "benchmark weights"))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def random_config(preset: Preset) -> CheckpointConfig:
    """Return what the folder of a random network says of it."""
    tiled = isinstance(preset.model, VL2Config)
    return CheckpointConfig(
        model=preset.model,
        image=preset.image,
        template=preset.template,
        specials=SPECIALS[tiled],
        layout="official" if tiled else "transformers",
    )


def quantise_beside(folder: Path, kind: Kind, *, dtype: str, target: Path | None = None) -> Path:
    """Return a folder with the weights of another one in a format, after writing it unless it is there.

    target: where; by default beside the other, as FOLDER-int8.

    Raises SeekVLError for a target that holds something else.
    """
    target = target or folder.with_name(f"{folder.name}-{kind}")
    if (target / "config.json").exists():
        there, wanted = read_config(target), read_config(folder)
        if (there.quantization, there.model) != (kind, wanted.model):
            raise SeekVLError(f"{target} holds something else than {folder} in {kind}; move it away")
        return target
    source = load_checkpoint(folder, device="cpu", dtype=dtype)
    tokenizer = source.folder / "tokenizer.json"
    save_quantized(source.model, target, kind=kind, config=source.config, tokenizer=tokenizer)
    return target


def _check_room(size: int, folder: Path) -> None:
    """Refuse weights of so many bytes that memory or the disk of the folder cannot hold."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    room = {"free memory": free_bytes(torch.device("cpu")), f"disk of {there}": shutil.disk_usage(there).free}
    for place, free in room.items():
        if size > free:
            raise SeekVLError(
                f"random weights of this model take {size / 2**30:.1f} GiB, the {place} has "
                f"{free / 2**30:.1f} GiB; choose a smaller model, or another place with --folder"
            )
