from itertools import count

import pytest
import torch
from torch import nn

from seekvl.evals.clock import device_clock, watch


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    monkeypatch.setattr("time.perf_counter", lambda: float(len(done)))
    assert device_clock(torch.device("cuda:1"))() == 1.0, "read after the wait"
    assert done == [torch.device("cuda:1")]
    assert device_clock(torch.device("cpu"))() == 1.0
    assert len(done) == 1


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
