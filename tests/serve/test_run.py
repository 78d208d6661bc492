"""The server as a process: callers who never finish, signals, and what it says when it cannot start."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from seekvl.serve import run
from tests.serve.conftest import ENDLESS, Running, chat_body, wait_until


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_a_caller_who_says_nothing_is_hung_up_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.3)
    with connect(server) as silent:
        assert silent.recv(100) == b""


def test_a_head_that_drips_is_hung_up_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.5)
    with connect(server) as slow:
        slow.settimeout(0.1)
        began = time.monotonic()
        slow.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
        closed = False
        while not closed and time.monotonic() - began < 20:
            try:
                slow.sendall(b"x")  # each letter is in time, all of them are not
                closed = slow.recv(100) == b""
            except TimeoutError:
                continue
            except OSError:
                closed = True
        assert closed


def test_a_second_head_is_waited_for_only_so_long(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.5)
    with connect(server) as slow:
        request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        slow.sendall(request)
        found = b""
        while b'"ok"' not in found:
            found += slow.recv(1000)
        slow.sendall(request[:20])
        assert slow.recv(100) == b""


def test_a_long_answer_is_not_taken_for_a_slow_head(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.1)
    found = server.chat(max_tokens=200, ignore_eos=True)
    assert found.json()["usage"]["completion_tokens"] == 200


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the real command; give its process and its address."""
    port = free_port()
    command = [sys.executable, "-c", "from seekvl.cli.main import app; app()"]
    started = subprocess.Popen(
        [*command, "serve", "--port", str(port), "--device", "cpu", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    try:
        yield started, f"http://127.0.0.1:{port}"
    finally:
        started.kill()
        started.wait()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_signal_lets_answers_end_and_refuses_new_ones() -> None:
    with process() as (server, url):
        wait_until(lambda: ready(url), seconds=180)
        body = chat_body(stream=True, n=2, **ENDLESS)
        chat = f"{url}/v1/chat/completions"
        with httpx.stream("POST", chat, json=body, trust_env=False, timeout=120) as answer:
            lines = answer.iter_lines()
            for _ in range(6):
                next(lines)
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/ready", trust_env=False).status_code == 503)
            refused = httpx.post(chat, json=chat_body(), trust_env=False)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert refused.json()["error"]["type"] == "server_error"
            assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
        assert reasons.count("length") == 2  # the context was full
        assert server.wait(60) == 0


def test_after_the_time_of_grace_answers_are_cut_with_a_proper_end() -> None:
    with process("--grace", "0") as (server, url):
        wait_until(lambda: ready(url), seconds=180)
        body = chat_body(stream=True, n=8, **ENDLESS)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, trust_env=False) as answer:
            lines = answer.iter_lines()
            for _ in range(20):
                next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert "its time was over" in rest[-2]
        assert server.wait(60) == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with process("--grace", "600") as (server, url):
        wait_until(lambda: ready(url), seconds=180)
        body = chat_body(stream=True, n=8, **ENDLESS)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, trust_env=False) as answer:
            lines = answer.iter_lines()
            for _ in range(20):
                next(lines)
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/ready", trust_env=False).status_code == 503)
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 1


def test_a_model_that_is_not_there_ends_it_with_one_line() -> None:
    with process("--model", "/nowhere/at/all") as (server, _):
        assert server.wait(180) == 1
        assert server.stderr is not None
        told = server.stderr.read()
    assert "/nowhere/at/all" in told
    assert "Traceback" not in told


def test_a_port_that_is_taken_ends_it_with_one_line(server: Running) -> None:
    port = server.url.rpartition(":")[2]
    with process("--port", port) as (second, _):
        assert second.wait(180) == 1
        assert second.stderr is not None
        told = second.stderr.read()
    assert "--port" in told
    assert "Traceback" not in told
