"""The CPU kernels beside torch and beside what memory gives: GB/s of each matrix a decoding step reads.

The matrices are those of DeepSeek-VL-1.3B and DeepSeek-VL2-tiny. From some ten rows on it is no longer the
reading that takes the time, and only the ratio of the sides tells something. Each figure reads fresh copies,
more than any cache holds; ours, torch and the plain read of the same memory take turns, and each shows its
median and its best. With --dtype int8 or int4 ours are quantised, and torch multiplies as many in bfloat16;
all GB/s are of ours, so that ratios are those of time.

    python benchmarks/kernels.py --threads 2 --json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seekvl.evals.machine import Neighbours, wait_until_quiet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from seekvl.engine.kernels.compiled import Library

PEER = "torch"
KINDS = ("int8", "int4")
PAUSE = 0.01
"""Seconds between two sides: the threads of the one before spin for a while, on the cores of the next."""
Run = Callable[[], object]
Work = tuple[dict[str, Run], "Tensor", float]
"""What each side does, with which weights, and the share of them that it reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A matrix of a network, or the experts one token goes through."""

    name: str
    rows: int
    width: int
    experts: int = 0
    active: int = 0
    """Experts a token; 0 for a plain matrix."""


SHAPES = (
    Shape(name="1.3b attention", rows=2048, width=2048),
    Shape(name="1.3b gate, up", rows=5632, width=2048),
    Shape(name="1.3b down", rows=2048, width=5632),
    Shape(name="1.3b head", rows=102400, width=2048),
    Shape(name="tiny attention", rows=1280, width=1280),
    Shape(name="tiny experts", rows=896, width=1280, experts=64, active=6),
    Shape(name="tiny head", rows=129280, width=1280),
)
TINY = (
    Shape(name="small matrix", rows=48, width=33),
    Shape(name="small experts", rows=16, width=24, experts=4, active=2),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Seconds of each side, turn by turn, for the bytes of weights read each time."""

    read_bytes: int
    seconds: dict[str, list[float]]

    def rate(self, side: str) -> float:
        """GB/s, median over the turns."""
        return self.read_bytes / statistics.median(self.seconds[side]) / 1e9

    def best(self, side: str) -> float:
        """GB/s of the best turn."""
        return self.read_bytes / min(self.seconds[side]) / 1e9


def main() -> None:
    args = parse()
    import torch

    from seekvl.engine.kernels.compiled import choose_level, library

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    level = choose_level(args.level)
    if level is None:
        sys.exit("there are no kernels to measure, or SEEKVL_KERNELS=off")
    if not wait_until_quiet(seconds=args.quiet):
        print("the machine is not idle; ratios may hold, absolute figures do not", file=sys.stderr)
    neighbours = Neighbours()
    native, dtype = library(), getattr(torch, "bfloat16" if args.dtype in KINDS else args.dtype)
    print(f"{level}, {args.dtype}, {args.threads} threads, torch {torch.__version__}; GB/s, median (best)\n")
    heads = ("ours", PEER, f"{PEER}, no oneDNN", "read", "ours/read", "ours/torch")
    print(f"{'matrix':<18}{'rows of x':>10}" + "".join(f"{head:>18}" for head in heads))
    figures = {}
    for shape in TINY if args.tiny else SHAPES:
        for batch in args.batch:
            measured = measure(shape, batch=batch, dtype=dtype, level=level, native=native, args=args)
            figures[f"{shape.name}, {batch}"] = show(shape, batch, measured)
    print(f"\ncores busy with other work: {neighbours.cores():.2f} on average")
    if args.json:
        print(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="rows of x")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32", *KINDS), default="bfloat16")
    parser.add_argument("--level", help="level of the kernels, the fastest by default")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--memory", type=int, default=256, help="MiB of weights a turn reads")
    parser.add_argument("--quiet", type=float, default=20.0, help="seconds to wait for an idle machine")
    parser.add_argument("--tiny", action="store_true", help="tiny matrices: tests the program, not the speed")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    for name in ("threads", "rounds", "memory"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    for batch in args.batch:
        if batch < 1:
            parser.error(f"--batch must be at least 1, not {batch}")
    return args


def measure(
    shape: Shape, *, batch: int, dtype: "torch.dtype", level: str, native: "Library", args: argparse.Namespace
) -> Measured:
    """Let the sides take turns over as many copies of the weights as fill the memory asked for."""
    import torch

    plain, quantised = (experts, packed_experts) if shape.experts else (matrices, packed_matrices)
    sides, weights, share = (quantised if args.dtype in KINDS else plain)(shape, batch, dtype, level, args)
    read_bytes = int(weights.nbytes * share)
    sides["read"] = lambda: native.read(args.threads, weights.data_ptr(), read_bytes)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(args.rounds + 1):
        for side, run in sides.items():
            time.sleep(PAUSE)
            with torch.backends.mkldnn.flags(enabled=side != "plain"):
                began = time.perf_counter()
                run()
                if turn:  # the first one makes torch's kernels
                    seconds[side].append(time.perf_counter() - began)
    return Measured(read_bytes=read_bytes, seconds=seconds)


def matrices(shape: Shape, batch: int, dtype: "torch.dtype", level: str, args: argparse.Namespace) -> Work:
    """Multiply with one copy [o, i] of a matrix after the other."""
    import torch
    import torch.nn.functional as F

    from seekvl.engine.kernels.compiled import LEVELS
    from seekvl.engine.kernels.products import raw_linear

    size = shape.rows * shape.width * dtype.itemsize
    weights = torch.empty(max(1, (args.memory << 20) // size), shape.rows, shape.width, dtype=dtype)
    weights.normal_(std=0.02)
    x = torch.randn(batch, shape.width).to(dtype)

    def ours() -> None:
        for weight in weights:
            raw_linear(x, weight, None, level=LEVELS.index(level), threads=args.threads)

    def theirs() -> None:
        for weight in weights:
            F.linear(x, weight)

    return {"ours": ours, PEER: theirs, "plain": theirs}, weights, 1.0


def experts(shape: Shape, batch: int, dtype: "torch.dtype", level: str, args: argparse.Namespace) -> Work:
    """Send tokens through experts, every call through others of them."""
    import torch

    from seekvl.engine.kernels.products import swiglu_experts
    from seekvl.models.moe import Experts, MoeConfig

    config = MoeConfig(
        experts=shape.experts,
        active=shape.active,
        shared=0,
        width=shape.rows,
        scoring="softmax",
        choice="greedy",
    )
    with torch.device("meta"):
        model = Experts(shape.width, config).to(dtype)
    weights = torch.empty(3 * shape.experts * shape.rows * shape.width, dtype=dtype).normal_(std=0.02)
    parts = [part.view(stack.shape) for part, stack in zip(weights.chunk(3), model.parameters(), strict=True)]
    for name, part in zip(("gate_proj", "up_proj", "down_proj"), parts, strict=True):
        setattr(model, name, torch.nn.Parameter(part, requires_grad=False))
    x, shares = torch.randn(batch, shape.width).to(dtype), torch.rand(batch, shape.active)
    calls = max(1, shape.experts // (batch * shape.active))
    chosen = torch.arange(calls * batch * shape.active).view(calls, batch, shape.active) % shape.experts

    def ours() -> None:
        for ids in chosen:
            swiglu_experts(
                x,
                experts=ids,
                weights=shares,
                gate=model.gate_proj,
                up=model.up_proj,
                down=model.down_proj,
                level=level,
                threads=args.threads,
            )

    def theirs() -> None:
        for ids in chosen:
            model(x, experts=ids, weights=shares)

    return {"ours": ours, PEER: theirs, "plain": theirs}, weights, chosen.numel() / shape.experts


def packed_matrices(
    shape: Shape, batch: int, dtype: "torch.dtype", level: str, args: argparse.Namespace
) -> Work:
    """Multiply with one quantised copy of a matrix after the other, and torch with as many plain ones."""
    import torch
    import torch.nn.functional as F

    from seekvl.engine.kernels.compiled import LEVELS
    from seekvl.engine.kernels.packed import raw_packed_linear
    from seekvl.models.quantized import packed_shape

    tiles, size = packed_shape(args.dtype, shape.rows, shape.width)
    weights = torch.randint(
        0x30, 0x40, (max(1, (args.memory << 20) // (tiles * size)), tiles, size), dtype=torch.uint8
    )
    plain = torch.empty(len(weights), shape.rows, shape.width, dtype=dtype).normal_(std=0.02)
    x = torch.randn(batch, shape.width).to(dtype)

    def ours() -> None:
        for weight in weights:
            raw_packed_linear(
                x,
                weight,
                None,
                kind=args.dtype,
                rows=shape.rows,
                level=LEVELS.index(level),
                threads=args.threads,
            )

    def theirs() -> None:
        for weight in plain:
            F.linear(x, weight)

    return {"ours": ours, PEER: theirs, "plain": theirs}, weights, 1.0


def packed_experts(
    shape: Shape, batch: int, dtype: "torch.dtype", level: str, args: argparse.Namespace
) -> Work:
    """Send tokens through quantised experts, and through plain ones."""
    import torch

    from seekvl.engine.kernels.packed import packed_experts as through
    from seekvl.models.quantized import packed_shape

    plain, _, share = experts(shape, batch, dtype, level, args)
    wide = packed_shape(args.dtype, shape.rows, shape.width)
    narrow = packed_shape(args.dtype, shape.width, shape.rows)
    sizes = [shape.experts * tiles * size for tiles, size in (wide, wide, narrow)]
    weights = torch.randint(0x30, 0x40, (sum(sizes),), dtype=torch.uint8)
    parts = torch.split(weights, sizes)
    gate, up, down = (
        part.view(shape.experts, *form) for part, form in zip(parts, (wide, wide, narrow), strict=True)
    )
    x, shares = torch.randn(batch, shape.width).to(dtype), torch.rand(batch, shape.active)
    calls = max(1, shape.experts // (batch * shape.active))
    chosen = torch.arange(calls * batch * shape.active).view(calls, batch, shape.active) % shape.experts

    def ours() -> None:
        for ids in chosen:
            through(
                x,
                experts=ids,
                weights=shares,
                gate=gate,
                up=up,
                down=down,
                kind=args.dtype,
                width=shape.rows,
                level=level,
                threads=args.threads,
            )

    return plain | {"ours": ours}, weights, share


def show(shape: Shape, batch: int, measured: Measured) -> dict[str, object]:
    """Print a line of the table and return it for `--json`."""
    sides = ("ours", PEER, "plain", "read")
    cells = [f"{measured.rate(side):.1f} ({measured.best(side):.1f})" for side in sides]
    peer = max(measured.rate(PEER), measured.rate("plain"))
    ratios = (measured.rate("ours") / measured.rate("read"), measured.rate("ours") / peer)
    cells += [f"{ratio:.2f}" for ratio in ratios]
    print(f"{shape.name:<18}{batch:>10}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    return {
        "ours": measured.rate("ours"),
        "peer": peer,
        "ratio": ratios[1],
        "unit": "GB/s",
        "peer_name": PEER,
        "ceiling": measured.rate("read"),
    }


if __name__ == "__main__":
    main()
