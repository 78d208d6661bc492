"""What tests of benchmarks share that run in this process: the program run, and its figures read."""

import json
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

RunProgram = Callable[..., str]
"""Takes a program and its arguments; returns what it prints."""


@pytest.fixture
def run_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[RunProgram]:
    threads = torch.get_num_threads()

    def output(program: ModuleType, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *arguments])
        program.main()
        return capsys.readouterr().out

    yield output
    torch.set_num_threads(threads)


def read_figures(said: str, *, peer: str) -> list[str]:
    """Check the figures in the last line; return their names."""
    figures = json.loads(said.splitlines()[-1])
    for name, figure in figures.items():
        assert set(figure) == {"ours", "peer", "ratio", "unit", "peer_name"}, name
        assert figure["ours"] > 0, name
        assert figure["peer"] > 0, name
        assert figure["ratio"] == figure["ours"] / figure["peer"], name
        assert figure["peer_name"] == peer
    return list(figures)
