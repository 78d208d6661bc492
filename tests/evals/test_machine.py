import time
from pathlib import Path

import pytest
import torch

from seekvl.evals.machine import (
    Neighbours,
    device_memory,
    fill_page_cache,
    peak_memory,
    processor,
    resident_memory,
    wait_until_quiet,
)


def test_own_work_is_nobody_elses() -> None:
    neighbours = Neighbours()
    until = time.perf_counter() + 0.05
    while time.perf_counter() < until:
        pass
    assert neighbours.cores() >= 0.0


def test_the_wait_ends() -> None:
    began = time.perf_counter()
    assert not wait_until_quiet(seconds=0.0)
    assert not wait_until_quiet(seconds=0.1, limit=-1.0)
    assert time.perf_counter() - began < 30


def test_memory_is_that_of_this_process() -> None:
    assert 0.01 < resident_memory() <= peak_memory() < 1024


def test_the_processor_has_a_name() -> None:
    assert processor()


def test_a_gpus_memory_is_what_torch_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (device.index + 2) << 30)
    assert device_memory(torch.device("cuda:1")) == 3.0
    assert 0.01 < device_memory(torch.device("cpu")) < 1024


def test_a_folder_without_weights_fills_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    fill_page_cache(tmp_path)
    fill_page_cache(tmp_path / "missing")
