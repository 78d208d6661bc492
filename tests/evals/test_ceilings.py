import time

import pytest
import torch

from seekvl.engine.kernels.compiled import missing
from seekvl.evals.ceilings import Ceilings, best_of, measure_ceilings
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


def test_whole_numbers_have_a_rate_of_their_own() -> None:
    found = Ceilings(threads=1, read=10.0, reader="torch", operations={"float32": 100.0, "int8": 400.0})
    work = {"read_bytes": 1, "operations": 1000, "whole_operations": 800}
    assert found.seconds(**work, dtype="float32") == (4.0, "arithmetic")
    nobody = Ceilings(threads=1, read=10.0, reader="torch", operations={"float32": 100.0})
    assert nobody.seconds(**work, dtype="float32") == (10.0, "arithmetic")


def test_of_several_measurements_the_best_counts_rate_by_rate() -> None:
    first = Ceilings(threads=2, read=10.0, reader="kernels", operations={"float32": 100.0, "int8": 300.0})
    second = Ceilings(threads=2, read=8.0, reader="kernels", operations={"float32": 110.0, "int8": 200.0})
    wanted = Ceilings(threads=2, read=10.0, reader="kernels", operations={"float32": 110.0, "int8": 300.0})
    assert best_of([first, second]) == best_of([second, first]) == wanted
    assert best_of([first]) == first


def test_products_are_those_of_whoever_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    if missing() is not None:
        pytest.skip(f"no kernels: {missing()}")

    def slow(*_: object) -> torch.Tensor:
        """Somebody who takes his time."""
        time.sleep(0.1)
        return torch.empty(0)

    monkeypatch.setattr("seekvl.evals.ceilings.linear", slow)
    monkeypatch.setattr("seekvl.evals.ceilings.packed_linear", lambda *_, **__: slow())
    monkeypatch.setattr(torch, "_int_mm", slow)
    found = measure_ceilings(threads=1, memory=1 << 20, side=64, turns=1)
    limit = 2 * 64**3 / 0.1
    assert found.operations["bfloat16"] > limit, "torch is the faster one"
    assert found.operations["int8"] <= limit, "both are slow"
    monkeypatch.undo()
    monkeypatch.setattr(torch, "_int_mm", slow)
    found = measure_ceilings(threads=1, memory=1 << 20, side=64, turns=1)
    assert found.operations["int8"] > limit, "the kernels are the faster ones"


def test_nobody_multiplies_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEKVL_KERNELS", "off")
    monkeypatch.delattr(torch, "_int_mm")
    found = measure_ceilings(threads=1, memory=1 << 20, side=64, turns=1)
    assert set(found.operations) == {"float32", "bfloat16"}


@pytest.mark.parametrize("name", ["threads", "memory", "side", "turns"])
def test_a_number_that_cannot_be_meant(name: str) -> None:
    with pytest.raises(SeekVLError, match=f"{name} must be at least 1, not 0"):
        measure_ceilings(**{"threads": 1, name: 0})
