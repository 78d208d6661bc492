"""How much fits into free memory: tokens of a prefill and tiles of a tower at once, and the cache.

Splitting changes no answer but for the last bits, only the peak. The estimates take the least favourable
kernel, one that writes attention scores out, so they err on the side of smaller pieces.
"""

import os
from pathlib import Path

import torch

from seekvl.engine.cache import token_bytes
from seekvl.engine.kernels.prompts import prompts_served
from seekvl.engine.scheduler import Limits
from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.llama import LlamaConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VL
from seekvl.models.vl2 import VL2, AnyVL

SHARE = 0.5
"""Part of the free memory that one pass may take; the rest is for everybody else."""

CACHE_SHARE = 0.4
"""Part of the free memory that the cache of an engine may take."""

FEATURE_SHARE = 0.02
"""Part of the free memory that features of pictures may take; one of DeepSeek-VL 1.3B takes 2.4 MB."""

MOST_TOKENS = 640
"""A piece of a prompt is never longer: running answers wait for it, and so many rows keep any product busy.
The 576 tokens of a DeepSeek-VL picture go in one with a question.
"""

GPU_TOKENS = 2048
"""The same on a GPU, which a piece of 640 tokens does not fill. Not measured yet."""

ROWS = {"cpu": 8, "cuda": 64}
"""Answers that grow at once. Eight is what the CPU's kernels take in a step."""

GUESS = 4
"""Tokens guessed ahead; longer guesses are seldom right to their end."""

LEAST_TOKENS = 64
"""A prefill never goes below this many tokens a pass: smaller pieces save little and cost much."""

SCORE_BYTES = 12
"""An attention score written out: float32 logits, their softmax, and a copy in the dtype of the values."""


def prefill_tokens(config: LlamaConfig | DeepseekV2Config, *, total: int, itemsize: int, free: int) -> int:
    """Return how many tokens of a prompt go through the language model at once.

    total: tokens visible at the end of the prompt. itemsize: bytes of a number. free: bytes.
    """
    wide = config.mlp_width
    if isinstance(config, DeepseekV2Config) and config.moe is not None:
        wide = max(wide, config.moe.active * (config.moe.width + config.width))
    channels = 8 * config.width + 3 * wide
    one = config.heads * total * SCORE_BYTES + channels * itemsize
    return max(LEAST_TOKENS, min(total, int(free * SHARE) // one))


def tower_tiles(config: SiglipConfig, *, itemsize: int, free: int) -> int:
    """Return how many tiles go through the vision tower at once."""
    patches = config.grid**2
    channels = 8 * config.width + 2 * config.mlp_width
    one = config.heads * patches**2 * SCORE_BYTES + patches * channels * itemsize
    return max(1, int(free * SHARE) // one)


def tiles_at_once(model: AnyVL) -> int | None:
    """Return how many tiles of a picture fit into free memory, a power of two; None where pictures have none.

    A power of two, so that a little more or less memory does not change the last bits of a picture.
    """
    if not isinstance(model, VL2):
        return None
    weight = model.language.embed_tokens.weight
    free = free_bytes(weight.device)
    return _power_of_two(tower_tiles(model.config.vision, itemsize=weight.element_size(), free=free))


def choose_limits(
    model: AnyVL,
    *,
    rows: int | None = None,
    cache_bytes: int | None = None,
    chunk: int | None = None,
    queue: int | None = None,
    exact: bool | None = None,
    guess: int | None = None,
    feature_bytes: int | None = None,
) -> Limits:
    """Return the limits of an engine on this machine; what is None follows from the model and free memory.

    exact: by default on a CPU only. There a row is computed as if it were alone at little cost; torch on an
    accelerator would have to take the rows one by one. guess: by default only with it, where a guess cannot
    change an answer by its last bits.
    """
    weight, config = model.language.embed_tokens.weight, model.config.language
    free, limit = free_bytes(weight.device), config.max_positions
    if cache_bytes is None:
        cache_bytes = int(free * CACHE_SHARE)
    if chunk is None and type(model) in (VL, VL2) and prompts_served(model.language):
        chunk = MOST_TOKENS  # the kernels never write scores out
    elif chunk is None:
        fits = prefill_tokens(config, total=limit, itemsize=weight.element_size(), free=free)
        chunk = min(GPU_TOKENS if weight.is_cuda else MOST_TOKENS, _power_of_two(fits))
    if exact is None:
        exact = weight.device.type == "cpu"
    return Limits(
        rows=ROWS.get(weight.device.type, ROWS["cuda"]) if rows is None else rows,
        tokens=max(1, cache_bytes // token_bytes(config, itemsize=weight.element_size())),
        longest=limit,
        chunk=chunk,
        queue=queue,
        exact=exact,
        guess=(GUESS if exact else 0) if guess is None else guess,
        feature_bytes=feature_bytes,
    )


def _power_of_two(value: int) -> int:
    """Return the largest power of two that is not above a value of at least 1."""
    return 1 << (value.bit_length() - 1)


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be had on a device; what cannot be told counts as 1 GiB."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [size for size in (_machine_bytes(), _container_bytes()) if size is not None]
    return min(found, default=2**30)


def _machine_bytes() -> int | None:
    """Return what the machine has left, counting file pages that it can drop."""
    table = Path("/proc/meminfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a container's limit leaves, counting file pages that it can drop; None without a limit."""
    limit, used = folder / "memory.max", folder / "memory.current"
    try:
        text = limit.read_text().strip()
        if text == "max":
            return None
        droppable = 0
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                droppable = int(line.split()[1])
        return max(0, int(text) - int(used.read_text()) + droppable)
    except (OSError, ValueError):
        return None
