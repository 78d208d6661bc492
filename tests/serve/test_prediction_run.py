"""Runs of predictions where things go wrong, or end at an odd moment."""

import asyncio
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

import seekvl
from seekvl.engine.handle import Handle
from seekvl.serve.errors import ApiError
from seekvl.serve.service import Answering, Wakes
from seekvl.serve.store import Store
from tests.serve.conftest import Start, running
from tests.serve.predicting import (  # noqa: F401 - fixtures
    FULL,
    Receiver,
    client_of,
    endless,
    full,
    receiver,
    until,
)

LONG = {**full(), "max_new_tokens": 4096, "temperature": 1}


class Nothing:
    """Stands for a handle of which nothing has come yet."""

    cancelled = False

    def poll(self) -> None:
        return None

    def cancel(self) -> None:
        self.cancelled = True


def test_a_cancel_that_comes_with_the_first_piece_is_heard() -> None:
    async def draw() -> bool:
        handle: Any = Nothing()
        wakes = Wakes(asyncio.get_running_loop())
        answering = Answering(handle, wakes=wakes, wait_seconds=60)

        async def read() -> None:
            async for _ in answering.pieces():
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(0)
        wakes.arrived[handle].set()
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(reading, 5)
        return handle.cancelled

    assert asyncio.run(draw()) is True
    assert {"poll", "cancel"} <= set(dir(Handle))


@pytest.mark.usefixtures("endless")
def test_a_server_that_stops_ends_its_predictions_in_good_order(vlm: seekvl.VLM, tmp_path: Any) -> None:
    where = f"sqlite:///{tmp_path}/store.db"
    with running(vlm, store=where, grace_seconds=0.5) as server:
        client = client_of(server)
        made = client.predictions.create(version=FULL, input=LONG)
        until(lambda: client.predictions.get(made.id).output)
        stopping = threading.Thread(target=server.server.handle_exit, args=(signal.SIGTERM, None))
        stopping.start()
        stopping.join()
    with running(vlm, store=where) as server:
        found = client_of(server).predictions.get(made.id)
        assert (found.status, found.error) == ("canceled", None)
        assert found.output["text_out"]


def test_running_answers_finish_while_the_server_stops(vlm: seekvl.VLM, tmp_path: Any) -> None:
    where = f"sqlite:///{tmp_path}/store.db"
    with running(vlm, store=where) as server:
        made = [client_of(server).predictions.create(version=FULL, input=full(seed=n)) for n in range(3)]
        until(lambda: server.server.service.vlm.engine.metrics().running or not live(server))
        server.server.handle_exit(signal.SIGTERM, None)
    with running(vlm, store=where) as server:
        found = [client_of(server).predictions.get(each.id) for each in made]
        assert found[0].output == {"img_out": None, "text_out": "WALL"}
        assert all(each.status in ("succeeded", "failed") for each in found)  # late ones were not let in


def live(server: Any) -> dict[str, Any]:
    return server.server.config.app.state.desk.live  # type: ignore[no-any-return]


def test_an_answer_that_cannot_be_kept_has_failed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    save, saved = Store.save, []

    async def full_disk(self: Store, prediction: Any) -> None:
        saved.append(prediction.status)
        if len(saved) == 2:
            raise OSError("no space left")
        await save(self, prediction)

    monkeypatch.setattr(Store, "save", full_disk)
    found = server.ask("POST", "/predictions", json={"input": full()}).json()
    assert (found["status"], saved) == ("failed", ["starting", "succeeded"])
    assert "could not be kept" in found["error"]
    assert live(server) == {}
    assert server.ask("POST", "/predictions", json={"input": full()}).json()["status"] == "succeeded"


def test_nobody_hears_of_an_end_before_it_is_kept(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    save, kept, saving = Store.save, threading.Event(), threading.Event()

    async def slow_disk(self: Store, prediction: Any) -> None:
        if prediction.status == "succeeded":
            saving.set()
            await asyncio.to_thread(kept.wait, 20)
        await save(self, prediction)

    monkeypatch.setattr(Store, "save", slow_disk)
    client = client_of(server)
    prediction = client.predictions.create(version=FULL, input=full())
    assert saving.wait(20)
    assert client.predictions.get(prediction.id).status == "processing"
    assert client.predictions.list().results[0].status == "processing"
    kept.set()
    prediction.wait()
    assert prediction.status == "succeeded"


def test_a_caller_who_was_replied_to_waits_for_a_place(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    service = server.server.service
    submit, refusals = service.submit, []

    def busy(request: Any, *, client: str) -> Answering:
        if len(refusals) < 2:
            refusals.append(1)
            raise ApiError(status=429, message="full", retry_after=1)
        return submit(request, client=client)

    monkeypatch.setattr(service, "submit", busy)
    prediction = client_of(server).predictions.create(version=FULL, input=full())
    prediction.wait()
    assert (prediction.status, len(refusals)) == ("succeeded", 2)
    refusals.clear()
    held = server.ask("POST", "/predictions", json={"id": "held", "input": full()})
    assert (held.status_code, len(refusals)) == (409, 1)
    assert server.ask("GET", "/v1/predictions/held").status_code == 404  # it never was


def test_an_engine_that_dies_fails_its_predictions(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    engine = server.server.service.vlm.engine

    def die(*_: object, **__: object) -> None:
        raise RuntimeError("a step broke")

    monkeypatch.setattr(engine, "step", die)
    prediction = client_of(server).predictions.create(version=FULL, input=full())
    prediction.wait()
    assert prediction.status == "failed"
    assert "the answer was lost" in prediction.error
    until(lambda: server.ask("GET", "/ready").status_code == 200)
    assert client_of(server).run(FULL, input=full())["text_out"] == "WALL"


@pytest.mark.usefixtures("endless")
def test_what_waits_too_long_is_told(start: Start) -> None:
    server = start(grace_seconds=0.5)
    service, client = server.server.service, client_of(server)
    engine = service.vlm.engine
    running_now = [client.predictions.create(version=FULL, input=LONG) for _ in range(engine.limits.rows)]
    until(lambda: engine.metrics().running == engine.limits.rows)
    service.settings = replace(service.settings, wait_seconds=0.3)
    began = time.monotonic()
    reply = server.ask("POST", "/predictions", json={"input": LONG})
    assert reply.status_code == 503
    assert int(reply.headers["Retry-After"]) > 0
    assert time.monotonic() - began < 20
    for each in running_now:
        each.cancel()


def test_a_hook_that_heard_the_beginning_hears_the_end(
    start: Start,
    receiver: Receiver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start(fetch_hosts=("127.0.0.1",))

    async def late(self: Answering) -> Any:
        raise ApiError(status=503, message="no place became free")
        yield

    monkeypatch.setattr(Answering, "pieces", late)
    asked = {"input": full(), "webhook": receiver.url}
    reply = server.ask("POST", "/predictions", json=asked)
    assert (reply.status_code, reply.json()["status"]) == (200, "failed")
    until(lambda: receiver.told("failed"))
    assert server.ask("POST", "/predictions", json={"input": full()}).status_code == 503
