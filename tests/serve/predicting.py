"""What tests of the predictions API share: pictures, a little server that is fetched from and called, and
answers that take long.
"""

import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import replicate

from seekvl.engine.request import Request
from seekvl.serve.service import Service
from tests.serve.conftest import Running

EXAMPLES = Path(__file__).parents[2] / "examples"
FULL = "seekvl/seekvl-nano"
SIMPLE = "seekvl/seekvl-nano-simple"
SIGN = EXAMPLES / "sign.png"
WORD = "What does the sign say?"
WHERE = "Where is the sign?"
KEYS = {
    *(
        "id",
        "model",
        "version",
        "input",
        "output",
        "status",
        "error",
        "logs",
        "metrics",
        "urls",
        "data_removed",
    ),
    *("created_at", "started_at", "completed_at"),
}
"""Of a prediction, all of which are always there."""


def data_url(path: Path = SIGN, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()


def full(question: str = WORD, **more: Any) -> dict[str, Any]:
    """Inputs of the model with several pictures."""
    return {"text": question, "image1": data_url(), "temperature": 0, **more}


def simple(question: str = WORD, **more: Any) -> dict[str, Any]:
    """Inputs of the model with one picture."""
    return {"prompt": question, "image": data_url(), "temperature": 0, **more}


def client_of(server: Running) -> replicate.Client:
    """The real client, as its users set it up."""
    return replicate.Client(base_url=server.url, api_token="any")


def until(true: Callable[[], object], *, seconds: float = 30.0) -> None:
    """Wait for something, not for ever."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.02)


@dataclass
class Call:
    """What was sent to the little server."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def told(self) -> dict[str, Any]:
        return json.loads(self.body)


@dataclass
class Receiver:
    """A server on this machine that gives a picture away and takes whatever is sent."""

    url: str = ""
    calls: list[Call] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    """Of the next answers; then 200."""
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with every answer."""
    open: threading.Event = field(default_factory=threading.Event)
    """Pictures are given only when it is set."""

    def told(self, status: str) -> list[dict[str, Any]]:
        """What was said of predictions in a state."""
        return [call.told for call in self.calls if call.told["status"] == status]


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def take(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.calls.append(Call(self.command, self.path, headers, body, time.monotonic()))
            self.answer(b"")

        def do_GET(self) -> None:
            receiver.open.wait(20)
            self.answer(SIGN.read_bytes())

        do_POST = do_PUT = take  # noqa: N815 - names of the library

        def answer(self, body: bytes) -> None:
            with contextlib.suppress(OSError):
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        receiver.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            receiver.open.set()
            httpd.shutdown()
            thread.join(timeout=10)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers go on until their budget or the context ends them."""
    prepare = Service.prepare

    async def without_end(self: Service, *given: Any, **options: Any) -> Request:
        return replace(await prepare(self, *given, **options), end_id=-1)

    monkeypatch.setattr(Service, "prepare", without_end)
