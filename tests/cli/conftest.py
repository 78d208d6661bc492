"""The command line run in this process, on the smallest golden checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from seekvl.cli.main import app

GOLDEN = Path(__file__).parents[1] / "golden"

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Call `seekvl` with arguments."""

    def call(*arguments: str | Path, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return call


@pytest.fixture
def model() -> tuple[str, ...]:
    """Options that choose the golden checkpoint."""
    return ("--model", str(GOLDEN / "vl1-siglip"), "--device", "cpu", "--dtype", "float32")
