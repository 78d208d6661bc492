"""How much of a prompt fits into free memory at once: tokens of a prefill, tiles of a vision tower.

Splitting changes no answer, only the peak. The estimates take the least favourable kernel, one that writes
attention scores out, so they err on the side of smaller pieces.
"""

import os
from pathlib import Path

import torch

from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.llama import LlamaConfig
from seekvl.models.siglip import SiglipConfig

SHARE = 0.5
"""Part of the free memory that one pass may take; the rest is for everybody else."""

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
