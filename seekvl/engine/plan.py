"""What a request will need, told before anything is loaded: tokens, bytes, operations, and what makes it fit.

Everything follows from configs; neither weights nor a tokenizer are read. The bytes are those of the busiest
moment of a process:

    program        Python, torch and seekvl themselves
    weights        what stays in memory; rows of a mapped embedding that no prompt uses do not
    cache          keys and values of all answers at their full length
    activations    the larger of tower and prefill, in pieces as the engine cuts them for this memory
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch

from seekvl.engine.budget import prefill_tokens, tower_tiles
from seekvl.engine.cache import BLOCK
from seekvl.models.cost import (
    active_parameters,
    cache_bytes_per_token,
    language_activation_bytes,
    language_flops,
    parameters,
    vision_activation_bytes,
    vision_flops,
)
from seekvl.models.quantized import Kind
from seekvl.models.vl2 import VL2Config
from seekvl.presets import CHECKPOINTS, SHORT_NAMES, TRAINED_TOKENS
from seekvl.processing.pad_image import visual_tokens as padded_tokens
from seekvl.processing.tile_image import Grid, TileImageConfig, plan_grid, tile_count, visual_tokens
from seekvl.runtime import SeekVLError
from seekvl.weights.config import CheckpointConfig, read_config
from seekvl.weights.load import BUNDLED, choose_format, find_folder
from seekvl.weights.quantize import saved_bytes, saved_vision_bytes

Size: TypeAlias = tuple[int, int]
"""Width and height of a picture in px."""

PROGRAM_CPU, PROGRAM_CUDA = 300 << 20, 600 << 20
"""Bytes of a process that has imported everything and loaded nothing; on a GPU, those of its context."""

PUBLISHED_DTYPE = torch.bfloat16
"""What all published checkpoints are stored in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What shall be answered at once, and how it is computed."""

    pictures: tuple[Size, ...] = ()
    """Of one conversation."""
    text_tokens: int = 64
    """Tokens of a prompt besides its pictures, those of the template counted."""
    new_tokens: int = 512
    """Most tokens of an answer."""
    batch: int = 1
    """Conversations of this kind answered together."""
    dtype: torch.dtype = torch.bfloat16
    quantize: str | None = None
    """Format the weights are turned into on the way in; None leaves them as the checkpoint has them."""
    max_tiles: int | None = None
    """Most tiles of a picture, for DeepSeek-VL2; None as the checkpoint's rule says."""
    cuda: bool = False

    def __post_init__(self) -> None:
        for name in ("text_tokens", "new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise SeekVLError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturePlan:
    """What one picture becomes."""

    size: Size
    grid: Grid | None
    """Columns and rows of its tiles; None in DeepSeek-VL, which pads it to a square."""
    views: int
    """Squares that pass the tower."""
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a workload needs."""

    workload: Workload
    kind: Kind | None
    """Format of the language model's matrices: asked for, or that of the checkpoint."""
    pictures: tuple[PicturePlan, ...]
    prompt_tokens: int
    """Of each conversation."""
    limit: int
    """Most tokens of a prompt."""
    weights: int
    """Bytes, as everything here that is not said to be tokens or operations."""
    cache: int
    activations: int
    program: int
    vision_flops: int
    """Operations of the towers for one conversation."""
    prefill_flops: int
    """Operations of the language model before the first token of one conversation."""
    token_bytes: int
    """Read from memory for one more token of one answer, at its full length."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.cache + self.activations + self.program


def find_config(name: str | Path) -> CheckpointConfig:
    """Return the config of a published checkpoint by name, a bundled model, or a folder; nothing is
    downloaded.

    Raises SeekVLError for a name that is none of these.
    """
    text = SHORT_NAMES.get(str(name), str(name))
    if text in CHECKPOINTS and not Path(name).is_dir():
        preset = CHECKPOINTS[text]
        return CheckpointConfig(
            model=preset.model,
            image=preset.image,
            template=preset.template,
            dtype=PUBLISHED_DTYPE,
            max_tokens=TRAINED_TOKENS,
        )
    if name not in BUNDLED and not Path(name).expanduser().is_dir():
        known = ", ".join([*BUNDLED, *SHORT_NAMES])
        raise SeekVLError(
            f"a plan downloads nothing and does not know {str(name)!r}; use a folder or {known}"
        )
    return read_config(find_folder(name))


def plan(config: CheckpointConfig, workload: Workload, *, available: int) -> Plan:
    """Count what a checkpoint needs for a workload with this many bytes of memory.

    Raises SeekVLError for a prompt or answer over the limits, a picture without size, for `max_tiles` with a
    checkpoint that has no tiles, and for a format that loading would refuse.
    """
    language, itemsize = config.model.language, workload.dtype.itemsize
    kind = choose_format(config, workload.quantize, device="cuda" if workload.cuda else "cpu")
    pictures = plan_pictures(config, workload.pictures, max_tiles=workload.max_tiles)
    seen = sum(picture.tokens for picture in pictures)
    prompt = workload.text_tokens + seen
    longest = prompt + workload.new_tokens
    if prompt > config.max_tokens or longest > language.max_positions:
        raise SeekVLError(
            f"the prompt takes {prompt:,} tokens (pictures {seen:,}, text {workload.text_tokens:,}) of "
            f"{config.max_tokens:,}, with the answer {longest:,} of {language.max_positions:,}; show fewer "
            "pictures, ask for a shorter answer, or set max_tiles for DeepSeek-VL2"
        )
    per_token = cache_bytes_per_token(language, bytes_per_number=itemsize)
    room = min(-(-longest // BLOCK) * BLOCK, language.max_positions)
    weights, cache = _weights(config, workload, kind=kind), workload.batch * room * per_token
    program = PROGRAM_CUDA if workload.cuda else PROGRAM_CPU
    views = [picture.views for picture in pictures]
    free = max(0, available - weights - cache - program)
    return Plan(
        workload=workload,
        kind=kind,
        pictures=pictures,
        prompt_tokens=prompt,
        limit=config.max_tokens,
        weights=weights,
        cache=cache,
        activations=_activations(config, views, prompt=prompt, itemsize=itemsize, free=free),
        program=program,
        vision_flops=vision_flops(config.model, pictures=sum(views)),
        prefill_flops=language_flops(language, tokens=prompt),
        token_bytes=_read(config, kind=kind, itemsize=itemsize) + longest * per_token,
    )


def plan_pictures(
    config: CheckpointConfig, sizes: tuple[Size, ...], *, max_tiles: int | None = None
) -> tuple[PicturePlan, ...]:
    """Tell what the pictures of a conversation become; errors as in `plan`."""
    for width, height in sizes:
        if width < 1 or height < 1:
            raise SeekVLError(f"a picture of {width}x{height} px is zero-sized")
    image = config.image
    if not isinstance(image, TileImageConfig):
        if max_tiles is not None:
            raise SeekVLError(f"max_tiles {max_tiles} is for DeepSeek-VL2; DeepSeek-VL has no tiles")
        tokens = padded_tokens(image)
        return tuple(PicturePlan(size=size, grid=None, views=1, tokens=tokens) for size in sizes)
    grids = [plan_grid(size, image, pictures=len(sizes), max_tiles=max_tiles) for size in sizes]
    return tuple(
        PicturePlan(size=size, grid=grid, views=tile_count(grid), tokens=visual_tokens(grid, image))
        for size, grid in zip(sizes, grids, strict=True)
    )


def remedies(config: CheckpointConfig, workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Yield settings that need less memory, the mildest first: each with all before it."""
    if workload.dtype == torch.float32:
        workload = replace(workload, dtype=torch.bfloat16)
        yield "dtype bfloat16", workload
    while workload.batch > 1:
        workload = replace(workload, batch=workload.batch // 2)
        yield f"batch {workload.batch}", workload
    if isinstance(config.image, TileImageConfig) and workload.pictures:
        grids = plan_pictures(config, workload.pictures, max_tiles=workload.max_tiles)
        most = max(across * down for across, down in (picture.grid for picture in grids if picture.grid))
        for tiles in (6, 4, 2, 1):
            if tiles < most:
                workload = replace(workload, max_tiles=tiles)
                yield f"max_tiles {tiles}", workload


def remedy(config: CheckpointConfig, workload: Workload, *, available: int) -> tuple[list[str], Plan] | None:
    """Return the fewest mild settings with which a workload fits, and its plan then; None if none does."""
    settings: dict[str, str] = {}
    for setting, milder in remedies(config, workload):
        settings[setting.partition(" ")[0]] = setting
        found = plan(config, milder, available=available)
        if found.total <= available:
            return list(settings.values()), found
    return None


def _read(config: CheckpointConfig, *, kind: Kind | None, itemsize: int) -> int:
    """Bytes of weights that one more token of one answer reads."""
    saved = 0.0 if kind is None else saved_bytes(config.model, kind, itemsize=itemsize, rows=1)
    return round(active_parameters(config.model.language) * itemsize - saved)


def _weights(config: CheckpointConfig, workload: Workload, *, kind: Kind | None) -> int:
    """Bytes of weights that stay in memory; of vision and adaptor as if all that may be were quantised.

    On a CPU a file is mapped where its dtype is the one asked for, and of the embedding only the rows that a
    prompt uses are ever read.
    """
    numbers = sum(parameters(config.model).values())
    language = config.model.language
    if not workload.cuda and workload.dtype == config.dtype:
        numbers -= language.vocab_size * language.width
    itemsize = workload.dtype.itemsize
    if kind is None:
        return numbers * itemsize
    saved = saved_bytes(config.model, kind, itemsize=itemsize)
    return numbers * itemsize - round(saved) - saved_vision_bytes(config.model, kind, itemsize=itemsize)


def _activations(config: CheckpointConfig, views: list[int], *, prompt: int, itemsize: int, free: int) -> int:
    """Bytes of the busiest moment: pictures pass the tower one after the other, then the prompt in pieces."""
    model = config.model
    at_once = max(views, default=0)
    if isinstance(model, VL2Config) and at_once:
        at_once = min(at_once, tower_tiles(model.vision, itemsize=itemsize, free=free))
    tower = vision_activation_bytes(model, pictures=at_once, bytes_per_number=itemsize)
    tokens = prefill_tokens(model.language, total=prompt, itemsize=itemsize, free=free)
    past = prompt - tokens
    prefill = language_activation_bytes(model.language, tokens=tokens, past=past, bytes_per_number=itemsize)
    embeds = prompt * model.language.width * itemsize
    return embeds + max(tower, prefill)
