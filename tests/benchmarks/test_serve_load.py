import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_load", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_load"] = module
    spec.loader.exec_module(module)
    return module


def test_two_seconds_of_load() -> None:
    few = ("--minutes", "0.034", "--alone", "1", "--clients", "6", "--tokens", "8", "--probes", "4", "--json")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *few], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.stdout, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["errors"] == 0, done.stderr
    assert said["200"] >= 6
    for name in ("throughput", "slowest client", "memory", "first byte"):
        assert set(said[name]) == {"ours", "peer", "ratio", "unit", "peer_name"}
        assert said[name]["ours"] > 0


@pytest.mark.parametrize(
    ("tokens", "ended", "memory", "status"),
    [
        ((10, 12, 14), {"200": 3}, (1.0, 1.0), 0),
        ((10, 12, 14), {"200": 2, "429": 1, "503": 1}, (1.0, 1.01), 0),
        ((5, 12, 14), {"200": 3}, (1.0, 1.0), 1),
        ((10, 12, 14), {"200": 3, "500": 1}, (1.0, 1.0), 1),
        ((10, 12, 14), {"200": 3, "broken": 1}, (1.0, 1.0), 1),
        ((10, 12, 14), {"200": 3}, (1.0, 1.03), 1),
    ],
)
def test_what_may_not_be_ends_with_1(
    program: ModuleType,
    tokens: tuple[int, ...],
    ended: dict[str, int],
    memory: tuple[float, float],
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clients = [program.Client(number, count) for number, count in enumerate(tokens)]
    clients[0].ended.update(ended)
    early, late = memory
    load = program.Load(clients, 1.0, [early] * 6 + [late] * 2)
    args = Namespace(model="m", clients=3, tokens=8, json=True)
    assert program.report(load, alone=40.0, delays=[0.001, 0.002], args=args) == status
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["throughput"]["ours"] == sum(tokens)
    assert said["slowest client"]["ratio"] == tokens[0] / 12
