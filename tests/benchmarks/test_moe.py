import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import moe as program

from seekvl.models.moe import Moe
from tests.benchmarks.conftest import RunProgram, read_figures

QUICK = ("--tiny", "--rounds", "1", "--threads", "1", "--tokens", "32", "--quiet", "0")
Run = Callable[..., str]


@pytest.fixture
def run(run_program: RunProgram) -> Run:
    return partial(run_program, program)


def layer() -> Moe:
    config = program.tiny_language(small=True)
    assert config.moe is not None
    with torch.device("meta"):
        model = Moe(config.width, config.moe)
    program.fill(model)
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_figure_of_both_sides(dtype: str, run: Run) -> None:
    said = run(*QUICK, "--json", "--dtype", dtype)
    assert sorted(read_figures(said, peer="loop over experts")) == sorted(program.FIGURES)
    assert "one layer: results differ by at most" in said
    assert "3 layers: results differ by at most" in said


def test_figures_can_be_chosen(run: Run) -> None:
    said = run(*QUICK, "--json", "--figures", "layer_decode", "model_prefill", "--layers", "2")
    assert list(json.loads(said.splitlines()[-1])) == ["layer_decode", "model_prefill"]
    assert "2 layers: results differ by at most" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, not 0"),
        (("--tokens", "31"), "--tokens must be at least 32, not 31"),
        (("--layers", "1"), "--layers must be from 2 to 12, not 1"),
        (("--tiny", "--layers", "4"), "--layers must be from 2 to 3, not 4"),
    ],
)
def test_a_number_that_cannot_be_meant(
    arguments: tuple[str, ...], message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_loop_shares_the_memory_of_the_weights() -> None:
    model = layer()
    loop = program.ExpertLoop(model)
    with torch.no_grad():
        model.experts.up_proj[3].fill_(7)
    assert bool((loop.experts[3].up == 7).all())
    assert not bool((loop.experts[2].up == 7).all())


def test_sides_that_do_not_compute_the_same_are_not_timed() -> None:
    model = layer()
    loop, x = program.ExpertLoop(model), torch.randn(1, 4, 64)
    loop.experts[int(model.gate(x).experts[0, 0, 0])].down = torch.nn.Parameter(torch.ones(64, 32))
    with torch.no_grad():
        pairs = {"prefill": (model(x), loop(x))}
    with pytest.raises(SystemExit, match="not the same computation"):
        program.agree(pairs, what="one layer", tolerance=1e-5)
    with pytest.raises(SystemExit, match="not the same computation"):
        program.agree({"fine": (x, x), "nan": (x * torch.nan, x)}, what="one layer", tolerance=1e-5)


def test_a_model_too_large_to_train_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moe.py", *QUICK, "--figures", "model_train"])
    monkeypatch.setattr(program, "free_bytes", lambda device: 1 << 20)
    args = program.parse()
    values, notes = program.measure_model(program.tiny_language(small=True), dtype=torch.float32, args=args)
    assert values == {}
    assert "training step of the whole model not measured" in notes[-1]
    assert "lower --layers" in notes[-1]
