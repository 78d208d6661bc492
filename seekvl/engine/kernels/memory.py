"""Memory for gradients that comes back: a gradient that was dropped leaves its memory to the next.

Memory fresh from the system costs as much as the arithmetic of a training step: its pages are made one by
one, when they are touched first (docs/performance.md). A trainer drops all gradients after each step and asks
for as many in the next. So a piece is kept when the last tensor in it is gone, and not before: a gradient
that somebody holds on to stays his.
"""

import contextlib
import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 22
"""Bytes below which torch is asked: the allocator of the system keeps such pieces by itself."""


class Pieces:
    """Pieces of memory, those in use and those that wait for a tensor of their size."""

    def __init__(self) -> None:
        self._waiting: defaultdict[int, list[mmap.mmap]] = defaultdict(list)

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """Return a tensor on the CPU with whatever its memory held before, as `torch.empty` does.

        Raises MemoryError where the system gives none.
        """
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.empty(tuple(shape), dtype=dtype)
        waiting = self._waiting[size]
        try:
            piece = waiting.pop()
        except IndexError:  # not asked beforehand: another thread may take the last one
            piece = _piece(size)
        view = memoryview(piece)  # the tensor holds on to it; it goes with the last tensor in this memory
        weakref.finalize(view, waiting.append, piece).atexit = False
        return torch.frombuffer(view, dtype=dtype).view(tuple(shape))

    def waiting(self) -> int:
        """Return the bytes that no tensor uses."""
        return sum(size * len(pieces) for size, pieces in self._waiting.items())

    def release(self) -> None:
        """Give what waits back to the system."""
        for pieces in self._waiting.values():
            pieces.clear()


GRADIENTS = Pieces()
"""The memory of the gradients of experts, of all networks of this process."""


def _piece(size: int) -> mmap.mmap:
    """Ask the system for memory, in large pages where it has them: they are made 512 at a time."""
    try:
        piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for a gradient of {size / 2**20:,.0f} MiB") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system built without them
            piece.madvise(mmap.MADV_HUGEPAGE)
    return piece
