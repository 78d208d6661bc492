import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
from seekvl.engine.kernels.accelerate import MOST_ROWS
from seekvl.engine.kernels.compiled import SWITCH, choose_level

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import vision as program

from tests.benchmarks.conftest import RunProgram, read_figures

QUICK = ("--tiny", "--rounds", "1", "--threads", "1", "--quiet", "0")
Run = Callable[..., str]


@pytest.fixture
def run(run_program: RunProgram) -> Run:
    return partial(run_program, program)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_figure_of_both_sides(dtype: str, run: Run) -> None:
    said = run(*QUICK, "--json", "--dtype", dtype)
    assert tuple(read_figures(said, peer="transformers")) == program.FIGURES
    for name in program.FIGURES:
        assert f"{name}: results differ by at most" in said
        assert f"{name}: blocks computed by {computer()}" in said


def computer() -> str:
    """Who computes towers on this machine."""
    level = choose_level()
    return level if level in MOST_ROWS else "torch"


def test_switched_off_torch_computes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert "siglip: blocks computed by torch" in run(*QUICK, "--figures", "siglip")


def test_figures_can_be_chosen(run: Run) -> None:
    said = run(*QUICK, "--json", "--figures", "so400m_10", "--cpu-time")
    assert list(json.loads(said.splitlines()[-1])) == ["so400m_10"]
    assert "CPU time of 1 thread" in said


def test_both_sides_hold_the_same_weights() -> None:
    vision = program.replace(program.SIGLIP_SO400M, image_size=28, width=16, layers=1, heads=1, mlp_width=8)
    tower, peer = program.towers(vision, dtype=torch.float32)
    with torch.no_grad():
        tower.blocks[0].mlp.fc1.weight.fill_(7)
    assert bool((peer.model.vision_model.encoder.layers[0].mlp.fc1.weight == 7).all())


def test_towers_that_do_not_compute_the_same_have_no_figures(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.Siglip, "forward", lambda self, pixels, normalized: self.pos_embed + 1)
    with pytest.raises(SystemExit, match="not the same computation"):
        run(*QUICK, "--figures", "so400m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, not 0"),
        (("--threads", "0"), "--threads must be at least 1, not 0"),
        (("--cpu-time", "--threads", "2"), "--cpu-time needs --threads 1, not 2"),
    ],
)
def test_a_number_that_cannot_be_meant(
    arguments: tuple[str, ...], message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
