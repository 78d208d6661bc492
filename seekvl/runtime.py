"""Facts of this process: our error type, devices and dtypes, seeds, optional packages, files that appear
whole.
"""

import contextlib
import hashlib
import importlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger("seekvl")

FLOAT32_LIMIT = 500_000_000
"""Parameters up to which a CPU computes in float32 by default; larger models default to bfloat16."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SeekVLError(ValueError):
    """What a user can cause and can mend: one line that says what was wrong, where, with which numbers, what
    to do.
    """


class PromptTooLongError(SeekVLError):
    """A prompt has more tokens than the model or a limit takes."""


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number; True and False are none.

    >>> is_whole(3), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def check_positive(what: str, config: "DataclassInstance", *, or_zero: tuple[str, ...] = ()) -> None:
    """Raise SeekVLError for a number among the fields of a config that is not finite or not above 0.

    or_zero: fields that may be 0 as well.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not (0 < value < math.inf or (value == 0 and field.name in or_zero)):
            raise SeekVLError(f"{what} {field.name} {value} must be above 0 and finite")


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which extra of seekvl brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SeekVLError(f"this needs the package {package}: pip install 'seekvl[{extra}]'") from error


def seed_for(seed: int, *purpose: str | int) -> int:
    """Derive the 63-bit seed of one purpose, so that no two uses of randomness share a stream.

    >>> seed_for(0, "order", 3) == seed_for(0, "order", 3) != seed_for(0, "order", 4)
    True
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Make the CPU torch generator of one purpose."""
    return torch.Generator().manual_seed(seed_for(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Make the numpy generator of one purpose."""
    return np.random.default_rng(seed_for(seed, *purpose))


def select_device(name: str | torch.device = "auto") -> torch.device:
    """Turn a name into a device that exists here; "auto" takes CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise SeekVLError(f"device {name!r} is not a torch device; use 'auto', 'cpu' or 'cuda'") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device.type not in present:
        raise SeekVLError(f"device {name!r} is none that seekvl computes on; use 'auto', 'cpu' or 'cuda'")
    if not present[device.type]:
        raise SeekVLError(
            f"device {name!r} was asked for, but torch {torch.__version__} sees no {device.type.upper()} "
            "here; use 'cpu'"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise SeekVLError(
            f"device {name!r} does not exist: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device


def select_dtype(name: str | torch.dtype = "auto", *, device: torch.device, parameters: int) -> torch.dtype:
    """Choose the dtype to compute in.

    "auto": on CUDA bfloat16 where the device has it, else float16; on a CPU float32 for a model of at most
    `FLOAT32_LIMIT` parameters and bfloat16 above.
    """
    if isinstance(name, torch.dtype):
        if name not in DTYPES.values():
            raise SeekVLError(f"dtype {name} is not supported; use one of {', '.join(DTYPES)}")
        return name
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32 if parameters <= FLOAT32_LIMIT else torch.bfloat16
    if not isinstance(name, str) or name not in DTYPES:
        raise SeekVLError(f"dtype {name!r} is not supported; use 'auto' or one of {', '.join(DTYPES)}")
    return DTYPES[name]


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place only when the block ends well.

    Whatever stops the block, Ctrl-C included, removes the temporary file and leaves an older `path` as it
    was.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise SeekVLError(f"cannot write {target}: the folder {target.parent} does not exist")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
