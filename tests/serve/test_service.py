"""Answers that nobody waits for, that wait too long, and an engine that dies under them."""

import asyncio
import base64
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest

import seekvl
from seekvl.engine.engine import Engine
from seekvl.engine.handle import Handle
from seekvl.engine.request import Piece
from seekvl.serve import run, service
from seekvl.serve.app import create_app
from seekvl.serve.chat import together
from seekvl.serve.errors import ApiError
from tests.serve.conftest import ENDLESS, LOOP, SETTINGS, Running, Start, chat_body, held, wait_until
from tests.serve.predicting import SIGN

CHAT = "/v1/chat/completions"


def client_of(server: Running, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.v1, api_key="any", **{"max_retries": 0, **options})


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_ends_an_answer_within_a_step(
    server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    engine, before = server.engine, server.engine.metrics()
    steps, cancelled = list[bool](), list[int]()
    step, cancel = engine.step, Handle.cancel

    def counted() -> bool:
        steps.append(step())
        return steps[-1]

    def noted(handle: Handle) -> None:
        cancelled.append(len(steps))
        cancel(handle)

    monkeypatch.setattr(engine, "step", counted)
    monkeypatch.setattr(Handle, "cancel", noted)
    request = httpx.Request("POST", server.url + CHAT, json=chat_body(stream=stream, **ENDLESS))
    lines = [f"{name.decode()}: {value.decode()}" for name, value in request.headers.raw]
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "\r\n".join((f"POST {CHAT} HTTP/1.1", *lines, "", "")).encode()
        connection.sendall(head + request.read())
        wait_until(lambda: engine.metrics().generated_tokens > before.generated_tokens + 5)
        hung_up = time.monotonic()
    wait_until(lambda: engine.metrics().running == 0)
    assert time.monotonic() - hung_up < 20
    after = engine.metrics()
    assert after.ended.get("cancelled", 0) == before.ended.get("cancelled", 0) + 1
    assert cancelled
    assert len(steps) - cancelled[0] <= 2, "the step under way, and one that finds nothing to do"
    assert after.generated_tokens - before.generated_tokens < 1500  # of about 2,000
    assert server.chat(max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_takes_a_request_out_of_the_queue(server: Running, stream: bool) -> None:
    engine = server.engine
    with held(engine):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                server.url + CHAT,
                json=chat_body(stream=stream, n=3),
                timeout=httpx.Timeout(10, read=0.5) if not stream else 10,
                trust_env=False,
            ) if not stream else _read_a_little(server)
        wait_until(lambda: engine.metrics().waiting == 0)


def _read_a_little(server: Running) -> None:
    """Read the first event of a stream and hang up."""
    with httpx.stream("POST", server.url + CHAT, json=chat_body(stream=True, n=3), trust_env=False) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    raise httpx.ReadTimeout("hung up")


def test_a_stream_nobody_began_to_read_is_cancelled() -> None:
    class Waiting:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

        async def pieces(self) -> Any:
            await asyncio.sleep(60)
            yield

    async def leave_at_once(answerings: list[Any]) -> None:
        pieces = together(answerings)
        drawing = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0)
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)

    answerings = [Waiting(), Waiting()]
    asyncio.run(leave_at_once(answerings))
    assert all(answering.cancelled for answering in answerings)


def test_hanging_up_while_a_request_is_handed_in_leaves_nothing_behind(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, handing, go_on = server.engine, threading.Event(), threading.Event()
    submit = engine.submit

    def slow(*given: Any, **more: Any) -> Any:
        handing.set()
        go_on.wait(30)
        return submit(*given, **more)

    before = engine.metrics()
    with monkeypatch.context() as patch, held(engine):
        patch.setattr(engine, "submit", slow)
        asking = threading.Thread(target=_ask_briefly, args=(server,))
        asking.start()
        assert handing.wait(30)
        asking.join(30)
        assert not asking.is_alive()
        time.sleep(0.3)  # until the server knows
        go_on.set()
        ended = before.ended.get("cancelled", 0) + 1
        wait_until(lambda: engine.metrics().ended.get("cancelled", 0) == ended)
    assert server.chat(max_tokens=1).status_code == 200


def _ask_briefly(server: Running) -> None:
    """Ask for something that a thread hands in, and hang up after a second."""
    asked = chat_body(response_format={"type": "json_object"})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + CHAT, json=asked, timeout=1.0, trust_env=False)


def test_a_full_queue_is_429_and_a_long_wait_503(start: Start) -> None:
    server = start(queue=1, wait_seconds=4.0)
    with held(server.engine):
        waiting: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: waiting.append(server.chat()))
        thread.start()
        wait_until(lambda: server.engine.metrics().waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client_of(server).chat.completions.create(**chat_body())
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "5"
        thread.join(30)
    (late,) = waiting
    assert late.status_code == 503
    assert late.headers["retry-after"]
    assert late.json()["error"]["type"] == "server_error"
    assert server.chat(max_tokens=1).status_code == 200


def test_several_choices_are_taken_in_together_or_not_at_all(start: Start) -> None:
    server = start(queue=2)
    with held(server.engine):
        assert server.chat(n=3).status_code == 429
        wait_until(lambda: server.engine.metrics().waiting == 0)


def test_an_answer_that_takes_too_long_is_cut_and_says_so(start: Start) -> None:
    server = start(answer_seconds=0.2)
    found = server.chat(**ENDLESS).json()
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["notices"] == ["the answer was cut: its time was over"]


def test_a_request_that_is_let_in_too_late_is_503(start: Start) -> None:
    server = start(answer_seconds=0.3)
    answers: list[httpx.Response] = []
    with held(server.engine):
        thread = threading.Thread(target=lambda: answers.append(server.chat()))
        thread.start()
        wait_until(lambda: server.engine.metrics().waiting == 1)
        time.sleep(0.5)
    thread.join(30)
    assert answers[0].status_code == 503


class Death:
    """Kills an engine's thread at its next steps."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, engine: Engine, plan: Any) -> None:
        if self.times:
            self.times -= 1
            raise SystemExit("killed")
        REAL_DO(engine, plan)


REAL_DO = Engine._do


def test_an_engine_that_died_is_started_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    death = Death(1)
    monkeypatch.setattr(service, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(Engine, "_do", lambda engine, plan: death(engine, plan))
    with held(server.engine):
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda n=n: answers.append(server.chat(max_tokens=n))) for n in (1, 2, 3)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.engine.metrics().waiting == 3)
    for thread in threads:
        thread.join(30)
    assert [answer.status_code for answer in answers] == [503] * 3  # one was let in, two waited
    assert server.ask("GET", "/health").status_code == 200
    wait_until(lambda: server.ask("GET", "/ready").status_code == 200)
    wait_until(lambda: server.figure("seekvl_engine_restarts_total") == 1)
    assert server.chat(max_tokens=1).status_code == 200


def test_an_engine_that_died_is_not_ready_until_it_is_started_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, go_on = start(), threading.Event()
    service_, restart = server.server.service, server.server.service._restart

    def slow() -> None:
        go_on.wait(60)
        restart()

    monkeypatch.setattr(service_, "_restart", slow)
    death = Death(1)
    monkeypatch.setattr(Engine, "_do", lambda engine, plan: death(engine, plan))
    assert server.chat(max_tokens=1).status_code == 503
    for _ in range(2):
        told = server.ask("GET", "/ready")
        assert (told.status_code, told.json()) == (503, {"status": "restarting"})
        assert told.headers["retry-after"]
        refused = server.chat(max_tokens=1)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert server.ask("GET", "/health").status_code == 200
        wait_until(lambda: service_.phase == "restarting")
    go_on.set()
    wait_until(lambda: server.ask("GET", "/ready").status_code == 200)
    assert server.chat(max_tokens=1).status_code == 200


def test_a_request_that_fails_takes_nobody_with_it(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = Engine._extend

    def broken(engine: Engine, job: Any, *given: Any, **more: Any) -> None:
        if job.room == 7 and engine._tasks[job][0].room < 4:
            raise ValueError("this one cannot be gone on with")
        extend(engine, job, *given, **more)

    monkeypatch.setattr(Engine, "_extend", broken)
    expected = server.chat(max_tokens=40, ignore_eos=True).json()["choices"]
    answers: dict[int, httpx.Response] = {}

    def ask(number: int) -> None:
        answers[number] = server.chat(max_tokens=7 if number == 2 else 40, ignore_eos=True)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    with held(server.engine):
        for thread in threads:
            thread.start()
        wait_until(lambda: server.engine.metrics().waiting == 5)
    for thread in threads:
        thread.join(60)
    failed = answers.pop(2)
    assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
    assert "cannot be gone on with" not in failed.text, "that is for the log"
    for answer in answers.values():
        assert answer.json()["choices"] == expected


def test_a_stream_that_breaks_ends_with_an_error_the_client_raises(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    death = Death(0)
    monkeypatch.setattr(Engine, "_do", lambda engine, plan: death(engine, plan))
    stream = client_of(server).chat.completions.create(**chat_body(stream=True), extra_body=ENDLESS)
    next(iter(stream))
    death.times = 1
    with pytest.raises(openai.APIError, match="the answer was lost"):
        list(stream)


def test_an_engine_that_dies_again_and_again_ends_the_server(
    vlm: seekvl.VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = seekvl.VLM(vlm.model, vlm.processor)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = SETTINGS.__class__(port=port, device="cpu", dtype="float32")
    monkeypatch.setattr(run, "create_app", lambda given: create_app(given, load=lambda _: own))
    death = Death(100)
    monkeypatch.setattr(Engine, "_do", lambda engine, plan: death(engine, plan))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run.serve(settings)))
    thread.start()
    until = time.monotonic() + 60
    while thread.is_alive() and time.monotonic() < until:
        try:
            found = httpx.post(
                f"http://127.0.0.1:{port}{CHAT}", json=chat_body(), trust_env=False, timeout=30
            )
            assert found.status_code == 503
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    thread.join(10)
    assert codes == [1]


def test_what_an_answer_fails_of_decides_the_status() -> None:
    assert service.failure(ApiError(status=429, message="x")).status == 429
    assert service.failure(service.DeadlinePassed("x")).status == 503
    assert service.failure(service.EngineStopped("x")).status == 503
    assert service.failure(seekvl.SeekVLError("x")).status == 400
    assert service.failure(RuntimeError("x")).status == 500


class Given:
    """Stands for a handle that gives what it was made with, all that is there at once."""

    waiting = False

    def __init__(self, *batches: list[Piece | Exception | None]) -> None:
        self.left = [item for batch in batches for item in (*batch, None)]

    def poll(self) -> Piece | None:
        found = self.left.pop(0) if self.left else None
        if isinstance(found, Exception):
            raise found
        return found

    def cancel(self) -> None:
        self.left.clear()


def piece(text: str) -> Piece:
    return Piece(text=text, token_id=1)


def test_what_came_before_a_failure_is_drawn_before_it_is_raised() -> None:
    async def draw() -> list[str]:
        handle: Any = Given([piece("a"), piece("b"), service.EngineStopped("broken")])
        answering = service.Answering(handle, wakes=service.Wakes(asyncio.get_running_loop()), wait_seconds=5)
        coming = answering.pieces()
        drawn = ["".join(each.text for each in await anext(coming))]
        with pytest.raises(ApiError, match="broken"):
            await anext(coming)
        return drawn

    assert asyncio.run(draw()) == ["ab"]


def test_an_asker_is_woken_for_what_comes_and_for_nothing_else() -> None:
    async def draw() -> tuple[list[str], int]:
        handle: Any = Given([], [piece("a")], [], [piece("b"), piece("c")])
        loop = asyncio.get_running_loop()
        wakes, calls = service.Wakes(loop), 0
        answering = service.Answering(handle, wakes=wakes, wait_seconds=5)
        drawn: list[str] = []

        async def read() -> None:
            async for pieces in answering.pieces():
                drawn.append("".join(each.text for each in pieces))

        reading = asyncio.create_task(read())
        while len(drawn) < 2 and calls < 50:
            calls += 1
            await loop.run_in_executor(None, wakes.notify, [handle])
            await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert wakes.arrived == {}, "nobody draws any more"
        wakes.notify([handle])  # so nobody is woken
        await asyncio.sleep(0.01)
        return drawn, calls

    drawn, calls = asyncio.run(draw())
    assert drawn == ["a", "bc"]
    assert calls <= 4


def test_a_notice_after_the_loop_has_ended_harms_nobody() -> None:
    loop = asyncio.new_event_loop()
    wakes = service.Wakes(loop)
    loop.close()
    wakes.notify([])


def test_only_what_takes_long_is_prepared_in_a_thread(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server, threads = start(), list[str]()
    vlm = server.server.service.vlm
    prepare = vlm.prepare

    def noted(*given: Any, **more: Any) -> Any:
        threads.append(threading.current_thread().name)
        return prepare(*given, **more)

    monkeypatch.setattr(vlm, "prepare", noted)
    picture = "data:image/png;base64," + base64.b64encode(SIGN.read_bytes()).decode()
    shown = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What?"}]
    for content in ("Hello.", "Hello. " * 300, shown, shown, [*shown, {"type": "text", "text": "a " * 1000}]):
        answer = server.chat(messages=[{"role": "user", "content": content}], max_tokens=1)
        assert answer.status_code == 200
    assert [name == LOOP for name in threads] == [True, False, False, True, False]
