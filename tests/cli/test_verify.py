"""The self-check and folders, from the command line."""

import json
import shutil
from pathlib import Path

from tests.cli.conftest import GOLDEN, Run


def test_self_check_passes_here(run: Run) -> None:
    result = run("verify")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "self-check"
    assert len(lines) > 5
    assert all(line.startswith("  ok ") for line in lines[1:])


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


def test_missing_folder_is_exit_1(run: Run, tmp_path: Path) -> None:
    result = run("verify", tmp_path / "nowhere", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
