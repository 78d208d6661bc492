"""What outlives a request, a restart and a crash."""

import asyncio
import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

import seekvl
from seekvl.runtime import SeekVLError
from seekvl.serve.errors import ApiError
from seekvl.serve.records import FileRecord, Prediction, iso
from seekvl.serve.settings import Settings
from seekvl.serve.store import INTERRUPTED, Store
from tests.serve.conftest import Start, running
from tests.serve.predicting import FULL, SIGN, client_of, full, until

Found = TypeVar("Found")


def do(work: Callable[[Store], Awaitable[Found]], **changes: Any) -> Found:
    """Work with a store, and close it."""

    async def run() -> Found:
        store = Store(Settings(**changes))
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def prediction(name: str, *, ended: bool = True, at: float = 0.0, output: str = "x") -> Prediction:
    moment = iso(time.time() - at)
    return Prediction(
        id=name,
        model="o/n",
        version="v",
        input={"text": "é \U0001f600"},
        output=output,
        status="succeeded" if ended else "processing",
        created_at=moment,
        completed_at=moment if ended else None,
    )


def uploaded(name: str, *, expires: float = 60.0) -> FileRecord:
    return FileRecord(
        id=name,
        name="a.png",
        content_type="image/png",
        size=4,
        sha256="",
        metadata={"a": [1]},
        purpose=None,
        created=time.time(),
        expires=time.time() + expires,
    )


@pytest.fixture(params=["memory", "file"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """Where things are kept."""
    return None if request.param == "memory" else f"sqlite:///{tmp_path}/store.db"


def test_what_was_saved_is_found(kept: str | None) -> None:
    async def work(store: Store) -> None:
        begun = prediction("a", ended=False)
        await store.save(begun)
        assert await store.prediction("a") == begun
        ended = replace(begun, status="succeeded", completed_at=iso(time.time()))
        await store.save(ended)
        assert await store.prediction("a") == ended
        assert await store.prediction("b") is None
        await store.forget("a")
        assert await store.prediction("a") is None
        await store.add_file(uploaded("f"), b"\x00abc")
        assert (await store.file("f"), await store.file_data("f")) == ((await store.files())[0], b"\x00abc")
        assert await store.delete_file("f") is True
        assert await store.delete_file("f") is False
        assert await store.file_data("f") is None

    do(work, store=kept)


def test_old_ones_go(kept: str | None) -> None:
    async def work(store: Store) -> None:
        await store.save(prediction("old", at=100))
        await store.save(prediction("new", at=10))
        await store.save(prediction("running", ended=False, at=100))
        assert await store.prediction("old") is None
        assert [each.id for each in (await store.predictions(cursor=None))[0]] == ["new", "running"]
        await store.add_file(uploaded("gone", expires=-1), b"")
        assert await store.file("gone") is None
        assert await store.files() == []

    do(work, store=kept, prediction_seconds=50.0)


def test_too_many_push_the_oldest_out(kept: str | None) -> None:
    async def work(store: Store) -> list[str]:
        await store.save(prediction("running", ended=False, at=90))
        for number in range(5):
            await store.save(prediction(f"p{number}", at=50 - number))
        return [each.id for each in (await store.predictions(cursor=None))[0]]

    assert do(work, store=kept, max_predictions=2) == ["p4", "p3", "running"]


def test_too_large_ones_push_the_oldest_out(kept: str | None) -> None:
    async def work(store: Store) -> list[str]:
        for number in range(4):
            await store.save(prediction(f"p{number}", at=50 - number, output="x" * 1000))
        await store.save(prediction("large", output="x" * 9000))
        return [each.id for each in (await store.predictions(cursor=None))[0]]

    assert do(work, store=kept, max_prediction_bytes=4000) == ["large"]


def test_pages_end_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seekvl.serve.store.PAGE_BYTES", 3000)

    async def work(store: Store) -> list[list[str]]:
        for number in range(5):
            await store.save(prediction(f"p{number}", at=50 - number, output="x" * 1000))
        pages, cursor = [], None
        while True:
            page, cursor = await store.predictions(cursor=cursor)
            pages.append([each.id for each in page])
            if cursor is None:
                return pages

    assert do(work) == [["p4", "p3"], ["p2", "p1"], ["p0"]]


def test_files_have_a_bound(kept: str | None) -> None:
    async def work(store: Store) -> None:
        await store.add_file(uploaded("a"), b"1234")
        await store.add_file(uploaded("b", expires=-1), b"1234")  # expired: it makes room
        await store.add_file(uploaded("d"), b"1234")
        with pytest.raises(ApiError) as caught:
            await store.add_file(uploaded("e"), b"1234")
        assert caught.value.status == 413

    do(work, store=kept, max_file_bytes=8)


def test_a_restart_keeps_all_and_tells_interrupted_ones_as_failed(tmp_path: Path) -> None:
    where = f"sqlite:///{tmp_path}/store.db"
    secret = do(lambda store: store.fact("secret", make=lambda: "first"), store=where)

    async def fill(store: Store) -> None:
        await store.save(prediction("ended"))
        await store.save(prediction("running", ended=False))
        await store.add_file(uploaded("f"), b"1234")

    do(fill, store=where)

    async def look(store: Store) -> None:
        ended, running = await store.prediction("ended"), await store.prediction("running")
        assert ended is not None
        assert running is not None
        assert (ended.status, ended.output, ended.input) == ("succeeded", "x", {"text": "é \U0001f600"})
        assert (running.status, running.error) == ("failed", INTERRUPTED)
        assert running.completed_at is not None
        assert await store.file_data("f") == b"1234"
        assert await store.fact("secret", make=lambda: "second") == secret == "first"

    do(look, store=where)
    assert (tmp_path / "store.db").stat().st_mode & 0o077 == 0


def test_a_store_is_for_one_server(tmp_path: Path) -> None:
    where = f"sqlite:///{tmp_path}/store.db"

    async def second(_: Store) -> None:
        with pytest.raises(SeekVLError, match="does another server use it"):
            Store(Settings(store=where))

    do(second, store=where)


def test_stores_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SeekVLError, match="cannot be used"):
        Store(Settings(store=f"sqlite:///{tmp_path}/missing/store.db"))
    (tmp_path / "words").write_text("these are words, not a database " * 10)
    with pytest.raises(SeekVLError, match="cannot be used"):
        Store(Settings(store=f"sqlite:///{tmp_path}/words"))
    with pytest.raises(SeekVLError, match="is unknown"):
        Settings(store="postgres://x")


def test_every_write_is_on_the_disk(tmp_path: Path) -> None:
    store = Store(Settings(store=f"sqlite:///{tmp_path}/store.db"))
    for pragma, value in (("synchronous", 2), ("journal_mode", "wal"), ("locking_mode", "exclusive")):
        assert store._database.execute(f"PRAGMA {pragma}").fetchone() == (value,)
    asyncio.run(store.close())
    with pytest.raises(sqlite3.ProgrammingError):
        store._database.execute("SELECT 1")


def test_a_server_restarted_knows_what_was(start: Start, tmp_path: Path, vlm: seekvl.VLM) -> None:
    where = f"sqlite:///{tmp_path}/store.db"
    with running(vlm, store=where) as first:
        made = client_of(first).predictions.create(version=FULL, input=full(), wait=True)
        file, secret = client_of(first).files.create(SIGN), client_of(first).webhooks.default.secret()
    second = client_of(start(store=where))
    assert second.predictions.get(made.id).output == made.output
    assert second.files.get(file.id).checksums == file.checksums
    assert second.webhooks.default.secret() == secret
    assert second.run(FULL, input=full(image1=f"/v1/files/{file.id}"))["text_out"] == "WALL"


class Process:
    """A server as its users start it, with a store."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        entry = "from seekvl.cli.main import app; app()"
        command = [sys.executable, "-c", entry, "serve", "--port", str(port), "--device", "cpu"]
        command += ["--store", f"sqlite:///{folder}/store.db", "--grace", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ.copy())
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=30)
        until(self._ready, seconds=120)

    def _ready(self) -> bool:
        assert self.process.poll() is None, "the server has ended"
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def begin(self, **more: Any) -> str:
        reply = self.http.post(f"/v1/models/{FULL}/predictions", json={"input": full(**more)})
        assert reply.status_code == 201
        return str(reply.json()["id"])

    def status(self, name: str) -> str:
        return str(self.http.get(f"/v1/predictions/{name}").json()["status"])

    def end(self, sign: int) -> int:
        self.process.send_signal(sign)
        return self.process.wait(timeout=30)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    """Start servers as processes; none outlives the test."""
    started: list[Process] = []

    def one() -> Process:
        started.append(Process(tmp_path))
        return started[-1]

    yield one
    for each in started:
        each.http.close()
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait(timeout=30)


def test_a_killed_server_loses_no_finished_prediction(spawn: Callable[[], Process]) -> None:
    first = spawn()
    path, held = f"/v1/models/{FULL}/predictions", {"Prefer": "wait"}
    ended = [first.http.post(path, json={"input": full(seed=n)}, headers=held).json() for n in range(5)]
    assert {each["status"] for each in ended} == {"succeeded"}
    file = first.http.post("/v1/files", files={"content": SIGN.read_bytes()}).json()
    begun = [first.begin(temperature=1, seed=number) for number in range(4)]
    known = {name: first.status(name) for name in begun}  # some may have ended
    assert first.end(signal.SIGKILL) == -signal.SIGKILL

    second = spawn()
    for each in ended:
        found = second.http.get(f"/v1/predictions/{each['id']}").json()
        assert {**found, "urls": None} == {**each, "urls": None}
    for name, status in known.items():
        found = second.http.get(f"/v1/predictions/{name}").json()
        assert found["status"] in ("succeeded", "failed")
        if status == "succeeded":
            assert found["status"] == "succeeded"
        elif found["status"] == "failed":
            assert found["error"] == INTERRUPTED
    assert second.http.get(f"/v1/files/{file['id']}/content").content == SIGN.read_bytes()
    assert second.end(signal.SIGTERM) == 0


def test_whatever_was_said_to_have_ended_when_it_was_killed_is_there_afterwards(
    spawn: Callable[[], Process],
) -> None:
    first, told, enough = spawn(), list[dict[str, Any]](), threading.Event()
    path, asked = f"{first.url}/v1/models/{FULL}/predictions", {"input": full(temperature=1)}

    def ask() -> None:
        with httpx.Client(trust_env=False, timeout=60) as http, contextlib.suppress(httpx.TransportError):
            while True:  # until the server is gone, in the middle of an answer or of its end
                told.append(http.post(path, json=asked, headers={"Prefer": "wait"}).json())
                if len(told) >= 20:
                    enough.set()

    asking = [threading.Thread(target=ask) for _ in range(6)]
    for thread in asking:
        thread.start()
    assert enough.wait(120)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    for thread in asking:
        thread.join(60)
    assert {each["status"] for each in told} == {"succeeded"}

    second = spawn()
    for each in told:
        found = second.http.get(f"/v1/predictions/{each['id']}").json()
        assert {**found, "urls": None} == {**each, "urls": None}
    page = second.http.get("/v1/predictions").json()["results"]
    assert {each["status"] for each in page} <= {"succeeded", "failed"}
