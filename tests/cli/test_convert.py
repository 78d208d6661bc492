"""Checkpoints in other forms, from the command line."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

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


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_calibrated_by_drawn_pictures(run: Run, tmp_path: Path, kind: str) -> None:
    calibrated = ("--calibrate", "drawn", "--pictures", 4)
    result = run("convert", SOURCE, tmp_path / "a", "--quantize", kind, *calibrated, "--json")
    assert result.exit_code == 0, result.output
    matrices = {matrix["name"]: matrix for matrix in json.loads(result.stdout)["matrices"]}
    head = matrices["language.lm_head"]
    assert head["kind"] == kind
    assert head["output_error"] > 0
    assert matrices["vision.blocks.0.mlp.fc1"]["kind"] is None
    back = load_checkpoint(tmp_path / "a", device="cpu")
    assert back.config.quantization == kind
    assert seekvl.load(tmp_path / "a", device="cpu").chat("Hello", max_new_tokens=2).usage.prompt_tokens > 0


def test_calibrated_by_a_folder_with_a_wish(run: Run, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 30), (9, 90, 200)).save(pictures / f"{name}.png")
    (pictures / "b.txt").write_text("What is blue?", encoding="utf-8")
    calibrated = ("--calibrate", pictures, "--agreement", 1)
    result = run("convert", SOURCE, tmp_path / "all", "--quantize", "int4", *calibrated)
    assert result.exit_code == 0, result.output
    assert "as it was: language.lm_head: in int8 it would move gaps by" in result.stdout
    assert "int4: " not in result.stdout


def test_experts_that_saw_too_little_are_named(run: Run, tmp_path: Path) -> None:
    calibrated = ("--calibrate", "drawn", "--pictures", 2)
    result = run("convert", GOLDEN / "vl2-tiny-like", tmp_path / "a", "--quantize", "int8", *calibrated)
    assert result.exit_code == 0, result.output
    assert "as too few tokens came to them: language.layers." in result.stdout


def test_small_matrices_where_they_are_asked_for(run: Run, tmp_path: Path) -> None:
    result = run("convert", "seekvl-nano", tmp_path / "a", "--quantize", "int4", "--smallest", 0, "--json")
    assert result.exit_code == 0, result.output
    kinds = {matrix["name"]: matrix["kind"] for matrix in json.loads(result.stdout)["matrices"]}
    assert kinds["language.layers.0.attn.q_proj"] == "int4"
    result = run(
        "convert", "seekvl-nano", tmp_path / "b", "--quantize", "int4", "--smallest", 262_144, "--json"
    )
    assert not any(matrix["kind"] for matrix in json.loads(result.stdout)["matrices"])


def test_pictures_that_are_not_there(run: Run, tmp_path: Path) -> None:
    arguments = ("--quantize", "int8", "--calibrate", tmp_path / "nowhere")
    result = run("convert", SOURCE, tmp_path / "a", *arguments)
    assert result.exit_code == 1
    assert "nowhere to calibrate by; give a folder of pictures" in result.stderr


def test_a_folder_in_use_is_found_before_anything_is_asked(run: Run, tmp_path: Path) -> None:
    assert run("convert", SOURCE, tmp_path).exit_code == 0
    arguments = ("--quantize", "int8", "--calibrate", tmp_path / "nowhere")
    result = run("convert", SOURCE, tmp_path, *arguments)
    assert result.exit_code == 1
    assert "already holds a checkpoint" in result.stderr


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
        ((SOURCE, "target", "--calibrate", "drawn"), 2, "goes with --quantize"),
        ((SOURCE, "target", "--smallest", "0"), 2, "goes with --quantize"),
        ((SOURCE, "target", "--quantize", "int8", "--agreement", "0.9"), 2, "goes with --calibrate"),
        ((SOURCE, "target", "--quantize", "int8", "--pictures", "9"), 2, "goes with --calibrate"),
        (
            (SOURCE, "target", "--quantize", "int8", "--calibrate", "drawn", "--agreement", "2"),
            2,
            "less than or equal to 1",
        ),
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
