from itertools import count

import pytest
import torch
from torch import nn

from seekvl.evals.clock import watch


def test_the_time_from_the_first_call_to_the_last_result() -> None:
    a, b, last = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    ticks = count()
    seconds = watch([a, b], last, clock=lambda: float(next(ticks)))
    assert seconds() == 0.0
    x = torch.ones(1, 2)
    last(a(b(x)))
    assert seconds() == 2.0
    last(a(x))
    assert seconds() == 1.0


def test_one_module() -> None:
    tower = nn.Linear(2, 2)
    ticks = count(5)
    seconds = watch(tower, tower, clock=lambda: float(next(ticks)))
    tower(torch.ones(1, 2))
    assert seconds() == pytest.approx(1.0)
