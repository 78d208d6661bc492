import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import seekvl
from seekvl.engine.engine import Engine
from seekvl.engine.request import Request, SamplingParams

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


def test_no_answer_is_wrong() -> None:
    few = ("--minutes", "0.01", "--pool", "4", "--clients", "3", "--each", "4", "--threads", "1", "--json")
    done = run(*few)
    assert "wrong or failed: 0" in done.stdout, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["requests"] == 4 * 3 * 4  # four rounds at least
    assert said["wrong"] == 0


def test_a_wrong_answer_is_found(soak: ModuleType) -> None:
    vlm = seekvl.load()
    request = Request(inputs=vlm.processor("Hello"), params=SamplingParams(max_new_tokens=4))
    right = soak.ask_alone(vlm, request)
    alone = right.alone
    others = {
        "tokens": replace(alone, token_ids=(1, *alone.token_ids[1:])),
        "cancelled": replace(alone, finish_reason="cancelled"),
        "something else": replace(alone, text="something else"),
    }
    for message, other in others.items():
        tally, engine = soak.Tally(), Engine(vlm.model, vlm.tokenizer)
        soak.compare(engine.submit(request), right, patience=None, tally=tally, timed=False)
        assert tally.wrong == []
        question = soak.Question(request, other)
        soak.compare(engine.submit(request), question, patience=None, tally=tally, timed=False)
        assert len(tally.wrong) == 1
        assert message in tally.wrong[0]
        engine.close()


def test_growth_and_faults_end_with_1(soak: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    args = Namespace(model="seekvl-nano", clients=2, json=False)
    assert soak.report(soak.Tally(), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.01, 1.01], args=args) == 0
    assert soak.report(soak.Tally(), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.03, 1.03], args=args) == 1
    tally = soak.Tally()
    tally.add("failed", fault="what was seen")
    assert soak.report(tally, [1.0] * 4, args=args) == 1
    assert "wrong or failed: 1" in capsys.readouterr().out


def test_a_number_that_cannot_be_meant() -> None:
    done = run("--minutes", "-1")
    assert done.returncode == 2
    assert "--minutes must be above 0 and finite, not -1.0" in done.stderr
