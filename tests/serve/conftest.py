"""Real servers on a free port of this machine, with the bundled model, for real clients."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

import seekvl
from seekvl.engine.engine import Engine
from seekvl.serve.app import create_app
from seekvl.serve.run import Server, server_config
from seekvl.serve.settings import Settings
from tests.serve.browsing import CHROMIUM, Opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MODEL = "seekvl/seekvl-nano"
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

    @property
    def engine(self) -> Engine:
        """What answers just now."""
        return self.server.service.vlm.engine

    def chat(self, **fields: Any) -> httpx.Response:
        """Ask for an answer to a text."""
        return self.ask("POST", "/v1/chat/completions", json=chat_body(**fields))

    def figure(self, name: str) -> float:
        """Return a figure without labels."""
        lines = self.ask("GET", "/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask once, with no proxy in between."""
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.request(method, self.url + path, **options)


def chat_body(**fields: Any) -> dict[str, Any]:
    """A question in a few words, greedy."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hello."}], "temperature": 0}
    return {**asked, **fields}


LOOP = "event loop"
"""Name of the thread of a server's event loop."""
ENDLESS = {"ignore_eos": True}
"""An answer that goes on until the context is full."""


def wait_until(happened: Callable[[], bool], *, seconds: float = 60.0) -> None:
    """Wait until something has happened."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, f"it has not happened within {seconds} s"
        time.sleep(0.02)


@contextlib.contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Let the engine make no step until the block ends."""
    with engine._driving:
        yield


Start = Callable[..., Running]
Visit = Callable[..., Opened]


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
    thread = threading.Thread(target=server.run, name=LOOP, daemon=True)
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

    def ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return server.ask("GET", "/ready").status_code == 200
        return False

    wait_until(ready)


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


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """One Chromium for the tests of a file."""
    sync = pytest.importorskip("playwright.sync_api", reason="the page is driven through playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"the page is driven in {CHROMIUM}, which is not here: apt-get install chromium")
    with sync.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            args=[
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
                *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),  # a camera
            ],
        )
        yield started
        started.close()


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Visit]:
    """Open pages; at the end nothing must have gone wrong in any, and nobody else been asked."""
    with contextlib.ExitStack() as stack:

        def open_page(url: str, **options: Any) -> Opened:
            opened = Opened(browser, url, **options)
            stack.callback(opened.close)
            return opened

        yield open_page


@pytest.fixture
def opened(visit: Visit, server: Running) -> Opened:
    """The page on the bundled model, ready."""
    return visit(server.url).ready()


@pytest.fixture(scope="module")
def tiled() -> Iterator[Running]:
    """A server of the bundled DeepSeek-VL2, which sees pictures in tiles."""
    with running(
        seekvl.load("seekvl-nano-moe", device="cpu", dtype="float32"), model="seekvl-nano-moe"
    ) as server:
        yield server
