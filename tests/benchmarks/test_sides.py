import sys
from argparse import Namespace
from itertools import count
from pathlib import Path

import pytest

from seekvl.evals.machine import Neighbours

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import sides as program


def test_sides_take_turns_and_the_median_counts() -> None:
    done: list[str] = []
    ticks = count()

    def clock() -> float:
        """A turn takes one more than the turn before."""
        tick = next(ticks)
        return float(tick // 2 if tick % 2 else 0)

    found = program.take_turns(
        {side: lambda side=side: done.append(side) for side in ("a", "b")},
        what="figure",
        rounds=3,
        clock=clock,
    )
    assert done == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": 3.0, "b": 2.0}


def test_the_rate_is_of_our_side(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"tower": {"seekvl": 2.0, "peer": 4.0, program.FLOPS: 6e9}}
    args = Namespace(rounds=1)
    figures = program.print_figures(values, peer="peer", unit="ms", neighbours=Neighbours(), args=args)
    assert figures == {
        "tower": {"ours": 2000.0, "peer": 4000.0, "ratio": 0.5, "unit": "ms", "peer_name": "peer"}
    }
    head, line = capsys.readouterr().out.splitlines()[-2:]
    assert head.split()[-2:] == ["seekvl/peer", "GFLOP/s"]
    assert line.split() == ["tower,", "ms", "2000.000", "4000.000", "0.50", "3"]
