"""Real servers on a free port of this machine, with the bundled model, for real clients."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

import seekvl
from seekvl.serve.app import create_app
from seekvl.serve.run import Server, server_config
from seekvl.serve.settings import Settings

SETTINGS = Settings(port=0, device="cpu", dtype="float32", wait_seconds=20.0, answer_seconds=60.0)


@dataclass(frozen=True)
class Running:
    """A server that runs in a thread of this process."""

    url: str
    server: Server
    settings: Settings

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask once, with no proxy in between."""
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.request(method, self.url + path, **options)


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def vlm() -> seekvl.VLM:
    """The bundled model; every server renews its engine."""
    return seekvl.load(device="cpu", dtype="float32")


@contextlib.contextmanager
def running(vlm: seekvl.VLM, **changes: Any) -> Iterator[Running]:
    """Run a server until the block ends."""
    settings = replace(SETTINGS, **changes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = replace(settings, port=port)
    own = seekvl.VLM(vlm.model, vlm.processor)
    app = create_app(settings, load=lambda _: own)
    server = Server(server_config(app, settings), service=app.state.desk.service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    started = Running(f"http://127.0.0.1:{port}", server, settings)
    try:
        wait_until_ready(started)
        yield started
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def wait_until_ready(server: Running) -> None:
    """Wait for the model."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if server.ask("GET", "/ready").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the server is not ready after 30 s")


@pytest.fixture(scope="session")
def server(vlm: seekvl.VLM) -> Iterator[Running]:
    """One server for all tests that change nothing about it."""
    with running(vlm) as started:
        yield started


@pytest.fixture
def start(vlm: seekvl.VLM) -> Iterator[Start]:
    """Start servers of one's own settings; they end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **changes: stack.enter_context(running(vlm, **changes))
