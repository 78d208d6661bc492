"""How far the GPU path goes: each level does what the one before it does, and one thing more.

off        torch walks through the layers, as on any device
eager      a step runs on memory that never moves and waits for nothing
graphs     it is recorded as a CUDA graph and replayed; attention and experts are our Triton kernels
compiled   what lies between them, and the blocks of vision towers, are compiled by torch
"""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Generic, TypeVar

import torch

from seekvl.runtime import SeekVLError, log

SWITCH = "SEEKVL_GPU"
"""Environment variable that names the level: auto, which is the last, or one of `LEVELS`."""

LEVELS = ("off", "eager", "graphs", "compiled")
RECORDED = ("graphs", "compiled")
"""Levels of a GPU alone."""

RECOMPILES = 64
"""Shapes that torch may compile a function for: seven buckets, layers with and without experts."""

Result = TypeVar("Result")


def choose_gpu_level(device: torch.device, name: str | None = None) -> str | None:
    """Return the level of a model on this device, None where torch walks through the layers; None as a name
    reads `SWITCH`.

    On a CPU that is None unless "eager" is asked for: what a GPU records then runs there as it is. Without
    Triton, which every CUDA build of torch on Linux brings, "auto" is "eager".

    Raises SeekVLError for a level that does not exist, or that wants Triton where there is none.
    """
    wish = os.environ.get(SWITCH, "auto") if name is None else name
    if wish not in ("auto", *LEVELS):
        raise SeekVLError(f"{SWITCH}={wish!r} is unknown; use auto or one of {', '.join(LEVELS)}")
    if wish == "off" or (device.type != "cuda" and wish != "eager"):
        return None
    triton = find_spec("triton") is not None
    if wish in RECORDED and not triton:
        raise SeekVLError(f"{SWITCH}={wish!r} needs the package triton; use eager or off")
    if wish != "auto":
        return wish
    return LEVELS[-1] if triton else "eager"


class Compiled(Generic[Result]):
    """A function as torch compiles it, for each shape anew; the plain one after the first failure."""

    def __init__(self, function: Callable[..., Result]) -> None:
        self._plain = function
        self._fast: Callable[..., Result] | None = torch.compile(function, dynamic=False, fullgraph=True)

    def __call__(self, *args: object) -> Result:
        """Call the function; what torch cannot compile is told once."""
        if self._fast is not None:
            from torch._dynamo import config
            from torch._dynamo.exc import TorchDynamoException

            try:
                with config.patch(recompile_limit=RECOMPILES):
                    return self._fast(*args)
            except TorchDynamoException as error:
                self._fast = None
                warn(str(error).strip().splitlines()[0])
        return self._plain(*args)


@cache
def warn(reason: str) -> None:
    """Say once what is slower than it could be."""
    log.warning("a GPU answers more slowly than it could, torch compiles nothing: %s", reason)
