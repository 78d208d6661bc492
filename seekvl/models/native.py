"""Which kernels of torch multiply a matrix by a single row on a CPU.

In bfloat16 torch hands every product to oneDNN, which rearranges the whole matrix first. That pays for many
rows. For one row torch's own kernels, which read the matrix as it lies, take half of the time.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class _Switch:
    """How many are inside of `native_products`, and what they go back to."""

    lock = threading.Lock()
    inside = 0
    before = True


@contextmanager
def native_products() -> Iterator[None]:
    """Multiply by torch's own kernels inside of this context.

    The switch belongs to the process. Another thread that multiplies meanwhile gets right results too, but
    for many rows it gets them late. Where the program has frozen torch's flags nothing is switched.
    """
    if torch.backends.flags_frozen():  # type: ignore[no-untyped-call]
        yield
        return
    mkldnn: Any = torch.backends.mkldnn
    with _Switch.lock:
        if not _Switch.inside:
            _Switch.before, mkldnn.enabled = mkldnn.enabled, False
        _Switch.inside += 1
    try:
        yield
    finally:
        with _Switch.lock:
            _Switch.inside -= 1
            if not _Switch.inside:
                mkldnn.enabled = _Switch.before


def products_for(x: Tensor) -> AbstractContextManager[None]:
    """Return the context in which x[..., i] is multiplied fastest: native products for a single row in
    bfloat16 on a CPU, without gradients; else one that changes nothing.
    """
    single = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() == x.shape[-1]
    if single and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return native_products()
    return nullcontext()
