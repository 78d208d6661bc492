"""Where the tests of the GPU path run: its reference on the CPU, and every level on a CUDA device."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from seekvl.engine.gpu.switch import LEVELS


@dataclass(frozen=True)
class Place:
    """A device and a level of the GPU path on it."""

    device: str
    level: str

    @property
    def atol(self) -> float:
        """Largest difference of two float32 logits: sums run in another order."""
        return 5e-5 if self.device == "cpu" else 1e-3


CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
PLACES = [pytest.param(Place("cpu", "eager"), id="cpu")] + [
    pytest.param(Place("cuda", level), id=f"cuda-{level}", marks=CUDA) for level in LEVELS[1:]
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with torch.inference_mode():
        yield request.param


@pytest.fixture(params=[param for param in PLACES if param.id != "cuda-eager"])
def fast(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The levels that record, and the reference."""
    with torch.inference_mode():
        yield request.param
