"""What programs share that measure two sides in one process: random weights, agreement, turns, figures."""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from seekvl.evals.clock import Clock
from seekvl.evals.machine import Neighbours, peak_memory
from seekvl.runtime import torch_generator

OURS = "seekvl"
FLOPS = "flops"
"""Among the sides of a figure: its operations, where they are known."""
BLOCK = 4_194_301
"""Random numbers that fill all weights, over and over; prime, so that no two experts are alike."""
SCALE = {"s": 1.0, "ms": 1e3}
"""What a second is in a unit."""

Values = dict[str, dict[str, float]]
"""Figure -> side -> seconds."""


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give a module on the meta device memory and random weights of deviation 0.02, norms ones."""
    model.to_empty(device="cpu")
    block = torch.empty(BLOCK).normal_(std=0.02, generator=torch_generator(0, "benchmark weights"))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        flat, numbers = parameter.view(-1), block.to(parameter.dtype)
        for start in range(0, len(flat), BLOCK):
            part = flat[start : start + BLOCK]
            part.copy_(numbers[: len(part)])


def share(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference as a share of the norm."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def agree(pairs: dict[str, tuple[Tensor, Tensor]], *, what: str, tolerance: float) -> str:
    """Say how well the sides agree; stop where they do not compute the same."""
    shares = {name: share(*pair) for name, pair in pairs.items()}
    worst = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    text = f"{what}: results differ by at most {shares[worst]:.1e} of their norm ({worst})"
    if not shares[worst] <= tolerance:
        sys.exit(f"{text}; {tolerance} is what rounding explains: not the same computation")
    print(text, file=sys.stderr)
    return text


def take_turns(
    runs: dict[str, Callable[[], object]], *, what: str, rounds: int, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Return the median seconds of each side; who goes first changes every round."""
    times: dict[str, list[float]] = {side: [] for side in runs}
    for number in range(rounds):
        for side in list(runs)[:: -1 if number % 2 else 1]:
            began = clock()
            runs[side]()
            times[side].append(clock() - began)
            print(f"{what}, round {number + 1}: {side} {times[side][-1]:.3f} s", file=sys.stderr)
    return {side: statistics.median(seconds) for side, seconds in times.items()}


def print_figures(
    values: Values, *, peer: str, unit: str, neighbours: Neighbours, args: argparse.Namespace
) -> dict[str, dict[str, object]]:
    """Print how it was measured, and the table; return what goes into a line of JSON."""
    print(
        f"median of {args.rounds} rounds; peak memory {peak_memory():.1f} GiB; "
        f"cores busy with other work: {neighbours.cores():.2f} on average\n"
    )
    rates = any(FLOPS in sides for sides in values.values())
    head = f"{'figure (lower is better)':<28}{OURS:>10}{peer:>20}{f'{OURS}/peer':>14}"
    print(head + (f"{'GFLOP/s':>10}" if rates else ""))
    figures: dict[str, dict[str, object]] = {}
    for figure, sides in values.items():
        ours, theirs = (sides[side] * SCALE[unit] for side in (OURS, peer))
        line = f"{f'{figure}, {unit}':<28}{ours:>10.3f}{theirs:>20.3f}{ours / theirs:>14.2f}"
        print(line + (f"{sides[FLOPS] / sides[OURS] / 1e9:>10.0f}" if rates else ""))
        entry = {"ours": ours, "peer": theirs, "ratio": ours / theirs, "unit": unit, "peer_name": peer}
        figures[figure] = entry
    return figures
