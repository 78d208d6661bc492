"""The benchmark on a CUDA device; skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from seekvl.engine.gpu.switch import LEVELS
from seekvl.evals.ceilings import measure_ceilings
from seekvl.evals.clock import device_clock
from seekvl.evals.speed import Settings, bench

SMALL = Path(__file__).parents[1] / "golden" / "vl1-siglip"
QUICK: dict[str, Any] = {
    "threads": 1,
    "batches": (2,),
    "tokens": 3,
    "rounds": 1,
    "quiet": 0.0,
    "device": "cuda",
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_the_clock_waits_for_the_device() -> None:
    device = torch.device("cuda")
    clock, x = device_clock(device), torch.rand(8192, 8192, device=device)
    x @ x
    began = clock()
    for _ in range(20):
        x = x @ x
    assert clock() - began > 20 * 2 * 8192**3 / 1e15, "no device multiplies float32 faster than that"


def test_ceilings_are_the_devices() -> None:
    found = measure_ceilings(threads=1, device="cuda", turns=3)
    assert found.reader == "copy"
    assert 5e10 < found.read < 2e13
    assert 1e12 < found.operations["bfloat16"] < 1e16


@pytest.mark.parametrize("model", ["seekvl-nano", "seekvl-nano-moe"])
def test_a_bundled_model(model: str) -> None:
    report = bench(model, Settings(**QUICK), say=print)
    assert (report.device, report.level) == ("cuda", LEVELS[-1])
    assert report.machine == torch.cuda.get_device_name()
    assert all(figure.ours > 0 for figure in report.figures)
    by_name = {figure.name: figure.ours for figure in report.figures}
    assert by_name["memory, batch 1"] < 1, "what torch handed out, not the process"
    assert f"{LEVELS[-1]} on cuda" in report.table()


def test_beside_transformers() -> None:
    pytest.importorskip("transformers")
    report = bench(str(SMALL), Settings(**QUICK, peer="transformers"), say=print)
    assert all(figure.peer is not None and figure.peer > 0 for figure in report.figures)
