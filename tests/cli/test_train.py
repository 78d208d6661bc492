"""Training, from the command line."""

from pathlib import Path

import pytest

import seekvl
from tests.cli.conftest import Run

MODELS = ("nano", "nano-moe")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--out"),
        (("--out", __file__), "--out"),
        (("--out", "run", "--workers", "-1"), "--workers"),
        (("--out", "run", "--threads", "0"), "--threads"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_wrong_calls(run: Run, model: str, arguments: tuple[str, ...], says: str) -> None:
    result = run("train", model, *arguments)
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--steps-scale", "0"), "scale 0.0 must be above 0"), (("--device", "abacus"), "device 'abacus'")],
)
@pytest.mark.parametrize("model", MODELS)
def test_bad_values_leave_no_folder(
    run: Run, tmp_path: Path, model: str, arguments: tuple[str, ...], says: str
) -> None:
    result = run("train", model, "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_trains_a_model_that_answers(run: Run, tmp_path: Path, model: str) -> None:
    options = ("--out", tmp_path, "--device", "cpu", "--workers", "0", "--steps-scale", "0.0001")
    result = run("train", model, *options)
    assert result.exit_code == 0, result.output
    assert f"--model {tmp_path / f'seekvl-{model}'}" in result.stdout
    assert "stage3" in result.stderr
    vlm = seekvl.load(tmp_path / f"seekvl-{model}", device="cpu")
    assert vlm.ask([], "Hello", max_new_tokens=3).usage.completion_tokens <= 3
    assert run("train", model, *options, "--fresh").exit_code == 1
