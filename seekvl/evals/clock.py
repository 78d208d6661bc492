"""Clocks that wait for a device, and timing a part of somebody else's network."""

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import nn

Clock: TypeAlias = Callable[[], float]
"""What tells seconds."""


def device_clock(device: torch.device) -> Clock:
    """Return a clock that is read when the device has done all it was given: a GPU lags behind."""
    if device.type != "cuda":
        return time.perf_counter

    def read() -> float:
        """Wait, then tell the seconds."""
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def watch(first: nn.Module | Sequence[nn.Module], last: nn.Module, *, clock: Clock) -> Callable[[], float]:
    """Time from the first call of a module to the result of another; return how to ask for the latest
    seconds, 0.0 before there are any.

    first: one module, or several of which any may be called first.
    """
    began: list[float] = []
    latest = [0.0]

    def end(_module: nn.Module, _inputs: object, _out: object) -> None:
        """Note the seconds, and begin anew."""
        latest[0] = clock() - began[0]
        began.clear()

    for module in [first] if isinstance(first, nn.Module) else first:
        module.register_forward_pre_hook(lambda _module, _inputs: began.append(clock()))
    last.register_forward_hook(end)
    return lambda: latest[0]
