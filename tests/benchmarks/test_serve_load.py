import importlib.util
import json
import selectors
import socket
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
    clients = [program.Client(number, tokens=count) for number, count in enumerate(tokens)]
    clients[0].ended.update(ended)
    early, late = memory
    load = program.Load(clients, 1.0, 0.5, 0.1, [early] * 6 + [late] * 2)
    args = Namespace(model="m", clients=3, tokens=8, threads=2, json=True)
    assert program.report(load, alone=(38.0, 42.0), delays=[0.001, 0.002], args=args) == status
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["throughput"]["ours"], said["throughput"]["peer"]) == (sum(tokens), 40.0)
    assert said["slowest client"]["ratio"] == tokens[0] / 12


class Wire:
    """A server's side of one connection: what it says, in the pieces in which it says it."""

    def __init__(self, program: ModuleType, *pieces: bytes) -> None:
        self.client, self.selector = program.Client(0), selectors.DefaultSelector()
        ours, self.client.connection = socket.socketpair()
        self.selector.register(self.client.connection, selectors.EVENT_READ, self.client)
        self.outcomes = []
        with ours:
            for piece in pieces:
                ours.sendall(piece)
                self.outcomes.append(program.read(self.client, selector=self.selector))
        if self.outcomes[-1] is None:
            self.outcomes.append(program.read(self.client, selector=self.selector))


OK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = b'data: {"usage": {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}}\n\n'
END = b"e\r\ndata: [DONE]\n\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "outcomes", "tokens", "open_still"),
    [
        ((OK + b"x" * 5000, USAGE + END, b"0\r\n\r\n"), [None, None, "200"], 7, True),
        ((OK[:7], OK[7:] + USAGE + END + b"0\r\n\r\n"), [None, "200"], 7, True),
        ((OK, USAGE), [None, None, "broken"], 0, False),  # it hung up
        ((OK + USAGE + b"\r\n0\r\n\r\n",), ["broken"], 0, False),  # it ended without saying so
        ((b"HTTP/1.1 429 Too Many Requests\r\n",), ["429"], 0, False),
        ((b"HTTP/1.1 5", b"03 Service Unavailable\r\n"), [None, "503"], 0, False),
    ],
)
def test_what_becomes_of_a_question_is_told_by_its_bytes(
    program: ModuleType, pieces: tuple[bytes, ...], outcomes: list[str | None], tokens: int, open_still: bool
) -> None:
    wire = Wire(program, *pieces)
    assert wire.outcomes == outcomes
    assert wire.client.tokens == tokens
    assert dict(wire.client.ended) == {outcomes[-1]: 1}
    assert (wire.client.connection is not None) == open_still
