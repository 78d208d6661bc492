"""The compiled library: where it is, what of it runs on this machine, and what to say where there is none."""

import atexit
import ctypes
import os
import platform
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar

from seekvl.engine.kernels import structures
from seekvl.runtime import SeekVLError, log

PATH = Path(__file__).parent / "native.so"

LEVELS = ("portable", "neon", "avx2", "avx512", "avx512_bf16")
"""What the kernels are compiled for, each level for what it is named after; the faster stand behind."""

SWITCH = "SEEKVL_KERNELS"
"""Environment variable: "auto" (also when unset) takes the fastest level, "off" leaves all to torch, and the
name of a level takes that one.
"""


Result = TypeVar("Result", covariant=True)


class Linear(Protocol[Result]):
    """`seekvl_linear` of kernels.cpp and its like: y[b, o] = x[b, i] W[o, i]^T + bias[o]."""

    def __call__(
        self,
        level: int,
        threads: int,
        weight_dtype: int,
        x_dtype: int,
        weight: int,
        bias: int | None,
        x: int,
        y: int,
        b: int,
        o: int,
        i: int,
        /,
    ) -> Result:
        """Write y."""
        ...


class Experts(Protocol[Result]):
    """`seekvl_experts` of kernels.cpp and its like: n tokens through k experts each, of width m."""

    def __call__(
        self,
        level: int,
        threads: int,
        dtype: int,
        gate: int,
        up: int,
        down: int,
        experts: int,
        weights: int,
        x: int,
        y: int,
        n: int,
        k: int,
        d: int,
        m: int,
        /,
    ) -> Result:
        """Write y[n, d]."""
        ...


class KeptExperts(Protocol):
    """`seekvl_experts_kept` of experts.cpp: `Experts` for any number of tokens, with a backward to come."""

    def __call__(
        self,
        level: int,
        threads: int,
        dtype: int,
        gate: int,
        up: int,
        down: int,
        experts: int,
        weights: int,
        x: int,
        y: int,
        kept: int,
        n: int,
        k: int,
        d: int,
        m: int,
        /,
    ) -> int:
        """Write y[n, d] and kept[n, k, 2, m]."""
        ...


class ExpertsBackward(Protocol):
    """`seekvl_experts_backward` of backward.cpp: the gradients of `count` experts, and of what they got."""

    def __call__(
        self,
        level: int,
        threads: int,
        dtype: int,
        gate: int,
        up: int,
        down: int,
        experts: int,
        weights: int,
        x: int,
        kept: int,
        grad: int,
        d_gate: int | None,
        d_up: int | None,
        d_down: int | None,
        d_x: int | None,
        d_weights: int | None,
        count: int,
        n: int,
        k: int,
        d: int,
        m: int,
        /,
    ) -> int:
        """Write those gradients that are not None."""
        ...


class Step(Protocol):
    """`seekvl_step` of kernels.cpp; the addresses are those of structures of structures.py."""

    def __call__(
        self, level: int, threads: int, network: int, cache: int, tokens: int, logits: int, /
    ) -> None:
        """Append to the cache and write logits."""
        ...


class Prompt(Protocol):
    """`seekvl_prompt` of kernels.cpp; the addresses are those of structures of structures.py."""

    def __call__(self, level: int, threads: int, network: int, cache: int, prompt: int, /) -> int:
        """Append to the cache and write what is asked for; return 0, or 1 where memory is short."""
        ...


class Tower(Protocol):
    """`seekvl_tower` of kernels.cpp; the addresses are those of structures of structures.py."""

    def __call__(self, level: int, threads: int, tower: int, views: int, /) -> int:
        """Write what becomes of the pictures; return 0, or 1 where memory is short."""
        ...


class PackedExperts(Protocol):
    """`seekvl_packed_experts` of packed.cpp: `Experts` with quantised matrices and any number of tokens."""

    def __call__(
        self,
        level: int,
        threads: int,
        kind: int,
        dtype: int,
        gate: int,
        up: int,
        down: int,
        experts: int,
        weights: int,
        x: int,
        y: int,
        n: int,
        k: int,
        d: int,
        m: int,
        /,
    ) -> None:
        """Write y[n, d]."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """The functions of the library. They take addresses, trust their arguments and let other threads run."""

    levels: tuple[str, ...]
    """The levels this machine executes, the fastest last."""
    linear: Linear[None]
    experts: Experts[None]
    linear_many: Linear[int]
    """For any number of rows; returns 0, or 1 where memory is short, as `experts_many` does."""
    experts_many: Experts[int]
    experts_kept: KeptExperts
    """As `experts_many`, and it keeps what the backward wants to know."""
    experts_backward: ExpertsBackward
    """Returns 0, or 1 where memory is short."""
    step: Step
    prompt: Prompt
    tower: Tower
    packed_linear: Linear[None]
    """With a quantised matrix and any number of rows; its kind stands in the place of the weight's dtype."""
    packed_experts: PackedExperts
    vnni: bool
    """Whether this machine has AVX-512's products of bytes; without them its levels use those of `avx2`."""
    read: Callable[[int, int, int], int]
    """Read memory (threads, address, bytes) and do next to nothing with it: the ceiling of every product."""
    release: Callable[[], None]
    """End the kernels' threads; the next product starts them again."""
    workers: Callable[[], int]
    """How many threads the kernels keep, besides those that call."""


@cache
def library() -> Library:
    """Load the library.

    Raises SeekVLError, saying how to get it, where it was not built or cannot be loaded.
    """
    if not PATH.exists():
        raise SeekVLError(
            "the CPU kernels were not compiled when seekvl was installed: install a C++ compiler (g++ or "
            "clang) and then seekvl again, with pip install --force-reinstall --no-deps --no-cache-dir"
        )
    try:
        native = ctypes.CDLL(str(PATH))
    except OSError as error:
        raise SeekVLError(f"the CPU kernels cannot be loaded ({error}); install seekvl again") from error
    i32, i64, address = c_int32, c_int64, c_void_p
    _check_structures(native)
    native.seekvl_linear.argtypes = [*[i32] * 4, *[address] * 4, *[i64] * 3]
    native.seekvl_experts.argtypes = [*[i32] * 3, *[address] * 7, *[i64] * 4]
    native.seekvl_linear_many.argtypes = native.seekvl_linear.argtypes
    native.seekvl_experts_many.argtypes = native.seekvl_experts.argtypes
    native.seekvl_experts_kept.argtypes = [*[i32] * 3, *[address] * 8, *[i64] * 4]
    native.seekvl_experts_backward.argtypes = [*[i32] * 3, *[address] * 13, *[i64] * 5]
    native.seekvl_step.argtypes = [*[i32] * 2, *[address] * 4]
    native.seekvl_prompt.argtypes = [*[i32] * 2, *[address] * 3]
    native.seekvl_tower.argtypes = [*[i32] * 2, *[address] * 2]
    native.seekvl_read.argtypes = [i32, address, i64]
    native.seekvl_read.restype = c_uint64
    native.seekvl_packed_linear.argtypes = [*[i32] * 4, *[address] * 4, *[i64] * 3]
    native.seekvl_packed_experts.argtypes = [*[i32] * 4, *[address] * 7, *[i64] * 4]
    products = (native.seekvl_linear, native.seekvl_experts, native.seekvl_step)
    packed = (native.seekvl_packed_linear, native.seekvl_packed_experts)
    for function in (*products, *packed, native.seekvl_release):
        function.restype = None
    bits = native.seekvl_levels()
    atexit.register(native.seekvl_release)
    return Library(
        levels=tuple(name for index, name in enumerate(LEVELS) if bits >> index & 1),
        linear=native.seekvl_linear,
        experts=native.seekvl_experts,
        linear_many=native.seekvl_linear_many,
        experts_many=native.seekvl_experts_many,
        experts_kept=native.seekvl_experts_kept,
        experts_backward=native.seekvl_experts_backward,
        step=native.seekvl_step,
        prompt=native.seekvl_prompt,
        tower=native.seekvl_tower,
        packed_linear=native.seekvl_packed_linear,
        packed_experts=native.seekvl_packed_experts,
        vnni=bool(native.seekvl_vnni()),
        read=native.seekvl_read,
        release=native.seekvl_release,
        workers=native.seekvl_workers,
    )


def _check_structures(native: ctypes.CDLL) -> None:
    """Refuse a library compiled from other sources: it would take other bytes for addresses."""
    found = 0
    names = ("seekvl_structures", "seekvl_experts_backward")  # of which older libraries have one or none
    if all(hasattr(native, name) for name in names):
        native.seekvl_structures.restype = c_int64
        found = native.seekvl_structures()
    wanted = structures.total_bytes()
    if found != wanted:
        raise SeekVLError(
            f"the CPU kernels were compiled from other sources than this seekvl ({found} and {wanted} bytes "
            "describe a decoding step); install seekvl again"
        )


def choose_level(name: str | None = None) -> str | None:
    """Return the level to compute on, or None where torch computes; None as a name reads `SWITCH`.

    Where the library is missing, "auto" warns once and leaves the work to torch; a level asked for by name is
    an error then.

    Raises SeekVLError for a level that does not exist or that this machine cannot execute.
    """
    wish = os.environ.get(SWITCH, "auto") if name is None else name
    if wish == "off":
        return None
    if wish != "auto" and wish not in LEVELS:
        raise SeekVLError(f"{SWITCH}={wish!r} is unknown; use auto, off or one of {', '.join(LEVELS)}")
    if wish == "auto":
        reason = missing()
        if reason is not None:
            _warn(reason)
            return None
        return library().levels[-1]
    if wish not in library().levels:
        raise SeekVLError(
            f"{SWITCH}={wish!r}: this machine ({platform.machine()}) executes "
            f"{', '.join(library().levels)}; use one of them, auto or off"
        )
    return wish


def missing() -> str | None:
    """Say why there are no kernels, or return None where there are."""
    try:
        library()
    except SeekVLError as error:
        return str(error)
    return None


@cache
def _warn(reason: str) -> None:
    """Say once what is slower than it could be."""
    log.warning("decoding on the CPU is slower than it could be, torch computes all of it: %s", reason)
