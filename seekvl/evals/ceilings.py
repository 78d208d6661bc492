"""What this machine can do at most: bytes moved a second, operations a second. The best of a few turns each.

Memory is read by as many threads as the model uses, through the kernels' own plain read, or where they were
not compiled through a sum of torch. Operations are those of square matrix products of torch; a multiply-add
counts as two. The memory of a GPU is measured by a copy, which reads every byte and writes it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from seekvl.engine.kernels.compiled import library, missing
from seekvl.evals.clock import device_clock
from seekvl.runtime import SeekVLError

MEMORY = {"cpu": 512 << 20, "cuda": 2 << 30}
"""Bytes read, or read and written, in a turn; more than any cache holds."""
SIDE = {"cpu": 1536, "cuda": 8192}
"""Side of the matrices."""
TURNS = 10
INT8 = "int8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """The most that was reached."""

    threads: int
    read: float
    """Bytes a second."""
    reader: str
    """What read: "kernels" or "torch"; on a GPU "copy", whose bytes are those read and those written."""
    operations: dict[str, float]
    """Operations a second by the dtype of the matrices; "int8" only where torch multiplies it here."""

    def seconds(self, *, read_bytes: float, operations: float, dtype: str) -> tuple[float, str]:
        """Return the least seconds that work can take, and what sets them: "memory" or "arithmetic"."""
        floors = {"memory": read_bytes / self.read, "arithmetic": operations / self.operations[dtype]}
        bound = max(floors, key=lambda name: floors[name])
        return floors[bound], bound


def measure_ceilings(
    *,
    threads: int,
    dtype: str = "bfloat16",
    device: str = "cpu",
    memory: int | None = None,
    side: int | None = None,
    turns: int = TURNS,
) -> Ceilings:
    """Measure this machine's CPU with so many threads, or a CUDA device; float32, bfloat16, `dtype` and int8
    are multiplied.

    Raises SeekVLError for fewer than 1 thread, turn, byte or row.
    """
    place = torch.device(device)
    memory = MEMORY[place.type] if memory is None else memory
    side = SIDE[place.type] if side is None else side
    for name, value in (("threads", threads), ("memory", memory), ("side", side), ("turns", turns)):
        if value < 1:
            raise SeekVLError(f"{name} must be at least 1, not {value}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        reader = "copy" if place.type == "cuda" else "kernels" if missing() is None else "torch"
        read = _read(place, threads=threads, memory=memory, turns=turns, reader=reader)
        operations = {
            name: _products(name, place, side=side, turns=turns)
            for name in dict.fromkeys(("float32", "bfloat16", dtype, INT8))
            if name != INT8 or _multiplies_int8(place)
        }
    finally:
        torch.set_num_threads(before)
    return Ceilings(threads=threads, read=read, reader=reader, operations=operations)


def _best(run: Callable[[], object], place: torch.device, *, turns: int) -> float:
    """Return the seconds of the fastest turn, after one that warms up."""
    run()
    clock, seconds = device_clock(place), []
    for _ in range(turns):
        began = clock()
        run()
        seconds.append(clock() - began)
    return min(seconds)


def _read(place: torch.device, *, threads: int, memory: int, turns: int, reader: str) -> float:
    """Return the bytes a second at which memory can be read."""
    if reader == "copy":
        half = torch.ones(-(-memory // 8), dtype=torch.float32, device=place)
        target = torch.empty_like(half)
        return 2 * half.nbytes / _best(lambda: target.copy_(half), place, turns=turns)
    block = torch.ones(-(-memory // 4), dtype=torch.float32)
    size = block.nbytes
    if reader == "torch":
        return size / _best(block.sum, place, turns=turns)
    read = library().read
    return size / _best(lambda: read(threads, block.data_ptr(), size), place, turns=turns)


@torch.inference_mode()
def _products(dtype: str, place: torch.device, *, side: int, turns: int) -> float:
    """Return the operations a second of a product of two square matrices."""
    if dtype == INT8:
        x, w = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=place) for _ in range(2))
        return 2 * side**3 / _best(lambda: torch._int_mm(x, w), place, turns=turns)
    x, w = (torch.rand(side, side, device=place).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * side**3 / _best(lambda: x @ w, place, turns=turns)


def _multiplies_int8(place: torch.device) -> bool:
    """Tell whether this torch multiplies int8 matrices there; the function is not one it promises."""
    ones = torch.ones(32, 32, dtype=torch.int8, device=place)
    try:
        torch._int_mm(ones, ones)
    except (AttributeError, RuntimeError):
        return False
    return True
