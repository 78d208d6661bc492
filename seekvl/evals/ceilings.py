"""What this machine can do at most: bytes moved a second, operations a second. The best of a few turns each.

Memory is read by as many threads as the model uses, through the kernels' own plain read, or where they were
not compiled through a sum of torch; it lies in large pages where the system has them, as mapped weights may.
Operations are those of square matrix products of torch or of the kernels, whichever is faster; a multiply-add
counts as two. The memory of a GPU is measured by a copy, which reads every byte and writes it.

A machine that is shared, as virtual ones are, gives more and less from one second to the next. So ceilings
are measured again beside what is held against them, and the best of all counts (`best_of`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from seekvl.engine.kernels.compiled import choose_level, library, missing
from seekvl.engine.kernels.memory import Pieces
from seekvl.engine.kernels.packed import packed_linear
from seekvl.engine.kernels.products import linear
from seekvl.evals.clock import device_clock
from seekvl.models.quantized import packed_shape
from seekvl.runtime import SeekVLError

MEMORY = {"cpu": 512 << 20, "cuda": 2 << 30}
"""Bytes read, or read and written, in a turn; more than any cache holds."""
SIDE = {"cpu": 1536, "cuda": 8192}
"""Side of the matrices."""
TURNS = 10
INT8: Literal["int8"] = "int8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """The most that was reached."""

    threads: int
    read: float
    """Bytes a second."""
    reader: str
    """What read: "kernels" or "torch"; on a GPU "copy", whose bytes are those read and those written."""
    operations: dict[str, float]
    """Operations a second by the dtype of the matrices; "int8" only where somebody multiplies it here."""

    def seconds(
        self, *, read_bytes: float, operations: float, dtype: str, whole_operations: float = 0.0
    ) -> tuple[float, str]:
        """Return the least seconds that work can take, and what sets them: "memory" or "arithmetic".

        operations: all of them. whole_operations: those of them that multiply whole numbers of eight bits, or
        of four, which are multiplied as eight; where nobody multiplies them, they are products of the dtype.
        """
        plain = self.operations[dtype]
        whole = self.operations.get(INT8, plain)
        arithmetic = (operations - whole_operations) / plain + whole_operations / whole
        floors = {"memory": read_bytes / self.read, "arithmetic": arithmetic}
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
        names = dict.fromkeys(("float32", "bfloat16", dtype, INT8))
        operations = {name: _products(name, place, side=side, turns=turns) for name in names}
    finally:
        torch.set_num_threads(before)
    rates = {name: rate for name, rate in operations.items() if rate is not None}
    return Ceilings(threads=threads, read=read, reader=reader, operations=rates)


def best_of(found: Sequence[Ceilings]) -> Ceilings:
    """Return the best of several measurements of one machine with as many threads, rate by rate."""
    first = found[0]
    rates = {name: max(one.operations[name] for one in found) for name in first.operations}
    return replace(first, read=max(one.read for one in found), operations=rates)


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
    block = Pieces().empty((-(-memory // 4),), dtype=torch.float32).fill_(1.0)
    size = block.nbytes
    if reader == "torch":
        return size / _best(block.sum, place, turns=turns)
    read = library().read
    return size / _best(lambda: read(threads, block.data_ptr(), size), place, turns=turns)


@torch.inference_mode()
def _products(dtype: str, place: torch.device, *, side: int, turns: int) -> float | None:
    """Return the operations a second of a product of two square matrices; None where nobody has it."""
    runs = _int8_products(place, side=side) if dtype == INT8 else _float_products(dtype, place, side=side)
    return max((2 * side**3 / _best(run, place, turns=turns) for run in runs), default=None)


def _float_products(dtype: str, place: torch.device, *, side: int) -> list[Callable[[], Tensor]]:
    """Return what multiplies floating-point matrices here: torch, and the kernels."""
    x, w = (torch.rand(side, side, device=place).to(getattr(torch, dtype)) for _ in range(2))
    runs = [lambda: x @ w]
    if _has_kernels(place):
        runs.append(lambda: linear(x, w))
    return runs


def _int8_products(place: torch.device, *, side: int) -> list[Callable[[], Tensor]]:
    """Return what multiplies matrices of int8 here: torch, whose function is not one it promises, and the
    kernels, which round their inputs first.
    """
    x, w = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=place) for _ in range(2))
    runs: list[Callable[[], Tensor]] = []
    try:
        torch._int_mm(x, w)
        runs.append(lambda: torch._int_mm(x, w))
    except (AttributeError, RuntimeError):
        pass
    if _has_kernels(place):
        rows, shape = torch.rand(side, side), packed_shape(INT8, side, side)
        packed = torch.randint(0x30, 0x40, shape, dtype=torch.uint8)  # scales, too, are ordinary numbers then
        runs.append(lambda: packed_linear(rows, packed, kind=INT8, rows=side))
    return runs


def _has_kernels(place: torch.device) -> bool:
    """Whether the kernels compute there."""
    return place.type == "cpu" and choose_level() is not None
