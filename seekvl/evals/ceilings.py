"""What this machine can do at most: bytes read a second, operations a second. The best of a few turns each.

Memory is read by as many threads as the model uses, through the kernels' own plain read, or where they were
not compiled through a sum of torch. Operations are those of square matrix products of torch; a multiply-add
counts as two.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from seekvl.engine.kernels.compiled import library, missing
from seekvl.runtime import SeekVLError

MEMORY = 512 << 20
"""Bytes read in a turn; more than any cache holds."""
SIDE = 1536
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
    """What read: "kernels" or "torch"."""
    operations: dict[str, float]
    """Operations a second by the dtype of the matrices; "int8" only where torch multiplies it here."""

    def seconds(self, *, read_bytes: float, operations: float, dtype: str) -> tuple[float, str]:
        """Return the least seconds that work can take, and what sets them: "memory" or "arithmetic"."""
        floors = {"memory": read_bytes / self.read, "arithmetic": operations / self.operations[dtype]}
        bound = max(floors, key=lambda name: floors[name])
        return floors[bound], bound


def measure_ceilings(
    *, threads: int, dtype: str = "bfloat16", memory: int = MEMORY, side: int = SIDE, turns: int = TURNS
) -> Ceilings:
    """Measure this machine's CPU with so many threads; float32, bfloat16, `dtype` and int8 are multiplied.

    Raises SeekVLError for fewer than 1 thread, turn, byte or row.
    """
    for name, value in (("threads", threads), ("memory", memory), ("side", side), ("turns", turns)):
        if value < 1:
            raise SeekVLError(f"{name} must be at least 1, not {value}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        reader = "torch" if missing() is not None else "kernels"
        read = _read(threads=threads, memory=memory, turns=turns, reader=reader)
        operations = {
            name: _products(name, side=side, turns=turns)
            for name in dict.fromkeys(("float32", "bfloat16", dtype, INT8))
            if name != INT8 or _multiplies_int8()
        }
    finally:
        torch.set_num_threads(before)
    return Ceilings(threads=threads, read=read, reader=reader, operations=operations)


def _best(run: Callable[[], object], *, turns: int) -> float:
    """Return the seconds of the fastest turn, after one that warms up."""
    run()
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _read(*, threads: int, memory: int, turns: int, reader: str) -> float:
    """Return the bytes a second at which memory can be read."""
    block = torch.ones(-(-memory // 4), dtype=torch.float32)
    size = block.nbytes
    if reader == "torch":
        return size / _best(block.sum, turns=turns)
    read = library().read
    return size / _best(lambda: read(threads, block.data_ptr(), size), turns=turns)


@torch.inference_mode()
def _products(dtype: str, *, side: int, turns: int) -> float:
    """Return the operations a second of a product of two square matrices."""
    if dtype == INT8:
        x, w = (torch.randint(-127, 128, (side, side), dtype=torch.int8) for _ in range(2))
        return 2 * side**3 / _best(lambda: torch._int_mm(x, w), turns=turns)
    x, w = (torch.rand(side, side).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * side**3 / _best(lambda: x @ w, turns=turns)


def _multiplies_int8() -> bool:
    """Tell whether this torch multiplies int8 matrices on a CPU; the function is not one it promises."""
    try:
        torch._int_mm(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8))
    except (AttributeError, RuntimeError):
        return False
    return True
