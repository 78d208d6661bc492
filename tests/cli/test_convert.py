"""Checkpoints in other forms, from the command line."""

import json
from pathlib import Path

import pytest
import torch

import seekvl
from seekvl.weights.load import load_checkpoint
from tests.cli.conftest import GOLDEN, Run

SOURCE = GOLDEN / "vl1-siglip"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_folder_answers(run: Run, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "small"
    result = run("convert", SOURCE, folder, "--quantize", kind, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["folder"] == str(folder)
    assert said["bytes"] == (folder / "model.safetensors").stat().st_size
    assert {matrix["kind"] for matrix in said["matrices"]} >= {kind}
    vlm = seekvl.load(folder, device="cpu")
    assert vlm.chat("Hello", max_new_tokens=4).usage.completion_tokens > 0


def test_the_table_names_what_stays(run: Run, tmp_path: Path) -> None:
    result = run("convert", SOURCE, tmp_path / "small", "--quantize", "int4")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'small'}: ")
    assert lines[0].endswith(" bytes of weights")
    assert any(line.startswith("int4: ") and "% of their norm" in line for line in lines)


def test_another_layout_and_dtype(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    result = run("convert", SOURCE, folder, "--layout", "transformers", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    back = load_checkpoint(folder, device="cpu", dtype="bfloat16")
    assert (back.config.layout, back.config.dtype) == ("transformers", torch.bfloat16)
    plain = load_checkpoint(SOURCE, device="cpu", dtype="bfloat16").model.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in back.model.state_dict().items())


def test_without_options_it_is_a_copy(run: Run, tmp_path: Path) -> None:
    assert run("convert", SOURCE, tmp_path / "copy").exit_code == 0
    back, source = (load_checkpoint(folder, device="cpu") for folder in (tmp_path / "copy", SOURCE))
    assert back.config.model == source.config.model
    pairs = zip(back.model.state_dict().values(), source.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_folder_in_use_is_kept(run: Run, tmp_path: Path) -> None:
    assert run("convert", SOURCE, tmp_path, "--quantize", "int8").exit_code == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    again = run("convert", SOURCE, tmp_path, "--quantize", "int4")
    assert again.exit_code == 1
    assert "already holds a checkpoint" in again.stderr
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert run("convert", SOURCE, tmp_path, "--quantize", "int4", "--overwrite").exit_code == 0
    assert load_checkpoint(tmp_path, device="cpu").config.quantization == "int4"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("no-such-model", "target"), 1, "there is no folder 'no-such-model'"),
        ((SOURCE, "target", "--quantize", "int3"), 2, "int3"),
        ((SOURCE, "target", "--quantize", "int4", "--layout", "transformers"), 2, "the official layout"),
        ((SOURCE,), 2, "target"),
    ],
)
def test_wrong_calls(run: Run, arguments: tuple[str | Path, ...], code: int, message: str) -> None:
    result = run("convert", *arguments)
    assert result.exit_code == code
    assert message in result.stderr


def test_quantising_twice_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("convert", SOURCE, tmp_path / "a", "--quantize", "int8").exit_code == 0
    result = run("convert", tmp_path / "a", tmp_path / "b", "--quantize", "int4")
    assert result.exit_code == 1
    assert "quantised already" in result.stderr
