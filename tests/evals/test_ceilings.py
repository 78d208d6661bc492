import pytest
import torch

from seekvl.evals.ceilings import Ceilings, measure_ceilings
from seekvl.runtime import SeekVLError


def test_the_machine_is_measured_and_left_as_it_was() -> None:
    threads = torch.get_num_threads()
    found = measure_ceilings(threads=1, dtype="float16", memory=1 << 20, side=64, turns=2)
    assert torch.get_num_threads() == threads
    assert found.read > 1e6
    assert set(found.operations) - {"int8"} == {"float32", "bfloat16", "float16"}
    assert min(found.operations.values()) > 1e6


def test_memory_is_read_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seekvl.evals.ceilings.missing", lambda: "not compiled")
    found = measure_ceilings(threads=1, memory=1 << 20, side=64, turns=1)
    assert found.reader == "torch"
    assert found.read > 1e6


def test_the_longer_time_is_the_floor() -> None:
    found = Ceilings(threads=1, read=10.0, reader="torch", operations={"float32": 100.0})
    assert found.seconds(read_bytes=50, operations=100, dtype="float32") == (5.0, "memory")
    assert found.seconds(read_bytes=5, operations=100, dtype="float32") == (1.0, "arithmetic")


@pytest.mark.parametrize("name", ["threads", "memory", "side", "turns"])
def test_a_number_that_cannot_be_meant(name: str) -> None:
    with pytest.raises(SeekVLError, match=f"{name} must be at least 1, not 0"):
        measure_ceilings(**{"threads": 1, name: 0})
