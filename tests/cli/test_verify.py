"""The self-check and folders, from the command line."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from seekvl.weights import self_check
from tests.cli.conftest import GOLDEN, Run


def test_self_check_passes_here(run: Run) -> None:
    result = run("verify")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "self-check"
    assert all(line.startswith("  ok ") for line in lines[1:])
    for case in ("vl1-hybrid single_zh, logits", "vl2-small-like two, tiles", "grounding, boxes"):
        assert sum(f" {case}: " in line for line in lines) == 1


def test_a_damaged_vector_is_a_failed_line_that_names_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "selfcheck"
    shutil.copytree(self_check.SELFCHECK, folder)
    path = folder / "vl2-base-like" / "expected.safetensors"
    tensors = load_file(path)
    tensors["weights"][40, 2] += 0.5
    save_file(tensors, path)
    monkeypatch.setattr(self_check, "SELFCHECK", folder)
    monkeypatch.setattr(self_check, "MINIATURES", {})
    result = run("verify")
    assert result.exit_code == 1
    assert result.stderr == "error: 1 check failed\n"
    (line,) = (line for line in result.stdout.splitlines() if "FAILED" in line)
    assert line.startswith("  FAILED vl2-base-like, attention and router: differs by 5.0e-01")
    assert "number [40, 2] is " in line
    said = json.loads(run("verify", "--json").stdout)
    assert said["ok"] is False
    bad = [check for check in said["reports"][0]["checks"] if not check["ok"]]
    assert [check["name"] for check in bad] == ["vl2-base-like, attention and router"]
    assert f"FAILED {bad[0]['name']}: {bad[0]['detail']}" in line


def test_json_of_a_good_folder(run: Run) -> None:
    result = run("verify", GOLDEN / "vl1-siglip", "--json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert said["ok"] is True
    assert [report["ok"] for report in said["reports"]] == [True, True]
    assert {"name", "ok", "detail"} == set(said["reports"][1]["checks"][0])


def test_broken_folder_is_exit_1(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(GOLDEN / "vl1-siglip", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = run("verify", folder)
    assert result.exit_code == 1
    assert "FAILED files" in result.stdout
    assert result.stderr == "error: 1 check failed\n"


def test_home_of_nobody_is_exit_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "MINIATURES", {})
    result = run("verify", "~no-such-user/model")
    assert (result.exit_code, result.stderr) == (1, "error: 1 check failed\n")
    assert "FAILED folder: there is no folder '~no-such-user/model'" in result.stdout


def test_missing_folder_is_exit_1(run: Run, tmp_path: Path) -> None:
    result = run("verify", tmp_path / "nowhere", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
