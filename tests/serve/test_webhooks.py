"""Webhooks, against a little server on this machine."""

import asyncio
import base64
import itertools
import time
from typing import Any

import pytest
from replicate.webhook import Webhooks as Validator
from replicate.webhook import WebhookSigningSecret, WebhookValidationError

from seekvl.runtime import SeekVLError
from seekvl.serve import webhooks
from seekvl.serve.settings import Settings
from seekvl.serve.webhooks import Webhook, Webhooks
from tests.serve.conftest import Running, Start
from tests.serve.predicting import (  # noqa: F401 - fixtures
    FULL,
    KEYS,
    Receiver,
    client_of,
    endless,
    full,
    receiver,
    until,
)


@pytest.fixture
def caller(start: Start) -> Running:
    """A server that may call this machine."""
    return start(fetch_hosts=("127.0.0.1",), grace_seconds=1.0)


def begin(server: Running, url: str, **more: Any) -> str:
    """Begin a prediction that is told of; return its id."""
    body = {"input": full(), "webhook": url, **more}
    reply = server.ask("POST", f"/v1/models/{FULL}/predictions", json=body)
    assert reply.status_code == 201
    return str(reply.json()["id"])


def test_beginning_and_end_are_told(caller: Running, receiver: Receiver) -> None:  # noqa: F811
    name = begin(caller, f"{receiver.url}/hook?a=1", webhook_events_filter=["start", "completed"])
    until(lambda: receiver.told("succeeded"))
    first, last = receiver.calls
    assert (first.method, first.path) == ("POST", "/hook?a=1")
    assert first.headers["content-type"] == "application/json"
    assert first.told["status"] == "processing"
    assert set(last.told) == KEYS
    assert last.told == caller.ask("GET", f"/v1/predictions/{name}").json()


@pytest.mark.usefixtures("endless")
def test_output_is_told_at_most_every_half_second(caller: Running, receiver: Receiver) -> None:  # noqa: F811
    long = full(max_new_tokens=4096, temperature=1)
    name = begin(caller, receiver.url, input=long, webhook_events_filter=["output", "completed"])
    until(lambda: len(receiver.calls) >= 3)
    client_of(caller).predictions.cancel(name)
    until(lambda: receiver.told("canceled"))
    *outputs, last = receiver.calls
    texts = [call.told["output"]["text_out"] for call in outputs]
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    gaps = [later.at - call.at for call, later in itertools.pairwise(outputs)]
    assert all(gap > 0.3 for gap in gaps)  # half a second, as the receiver sees it
    assert last.told["output"]["text_out"].startswith(texts[-1])


def test_logs_are_told(caller: Running, receiver: Receiver) -> None:  # noqa: F811
    begin(caller, receiver.url, webhook_events_filter=["logs"])
    until(lambda: receiver.calls)
    assert "was scaled down" in receiver.calls[0].told["logs"]


def test_the_older_form_tells_the_end_alone(caller: Running, receiver: Receiver) -> None:  # noqa: F811
    body = {"input": full(), "webhook_completed": receiver.url, "version": FULL}
    assert caller.ask("POST", "/v1/predictions", json=body).status_code == 201
    until(lambda: receiver.calls)
    (call,) = receiver.calls
    assert call.told["status"] == "succeeded"


def test_cog_routes_call_too(caller: Running, receiver: Receiver) -> None:  # noqa: F811
    body = {"input": full(), "webhook": receiver.url, "webhook_events_filter": ["completed"]}
    reply = caller.ask("POST", "/predictions", json=body, headers={"Prefer": "respond-async"})
    assert reply.status_code == 202
    until(lambda: receiver.told("succeeded"))
    failing = {**body, "input": full(image1="data:image/png;base64,AAAA")}
    caller.ask("POST", "/predictions", json=failing, headers={"Prefer": "respond-async"})
    until(lambda: receiver.told("failed"))
    assert "no picture" in receiver.told("failed")[0]["error"]


def test_the_end_is_told_again_until_it_is_heard(caller: Running, receiver: Receiver) -> None:  # noqa: F811
    receiver.statuses += [500, 429, 503]
    begin(caller, receiver.url, webhook_events_filter=["completed"])
    until(lambda: len(receiver.calls) == 4)
    assert len({call.headers["webhook-id"] for call in receiver.calls}) == 1
    assert len({call.body for call in receiver.calls}) == 1
    time.sleep(0.5)
    assert len(receiver.calls) == 4


@pytest.mark.parametrize("status", [404, 302])
def test_a_refusal_is_taken_for_one(caller: Running, receiver: Receiver, status: int) -> None:  # noqa: F811
    receiver.statuses += [status]
    receiver.headers["Location"] = f"{receiver.url}/elsewhere"
    begin(caller, receiver.url, webhook_events_filter=["completed"])
    until(lambda: receiver.calls)
    time.sleep(0.5)
    assert [call.path for call in receiver.calls] == ["/"]


def test_beginnings_are_told_once(caller: Running, receiver: Receiver) -> None:  # noqa: F811
    receiver.statuses += [500]
    begin(caller, receiver.url, webhook_events_filter=["start"])
    until(lambda: receiver.calls)
    time.sleep(0.5)
    assert len(receiver.calls) == 1


def test_calls_are_signed_as_the_client_checks(caller: Running, receiver: Receiver) -> None:  # noqa: F811
    begin(caller, receiver.url, webhook_events_filter=["completed"])
    until(lambda: receiver.calls)
    (call,) = receiver.calls
    secret = client_of(caller).webhooks.default.secret()
    body = call.body.decode()
    Validator.validate(headers=call.headers, body=body, secret=secret, tolerance=60)
    for changed in (
        {"body": body + " ", "secret": secret},
        {"body": body, "secret": WebhookSigningSecret(key=webhooks.new_secret())},
    ):
        with pytest.raises(WebhookValidationError):
            Validator.validate(headers=call.headers, **changed)


def test_no_holder_of_a_key_can_sign_for_another(start: Start, receiver: Receiver) -> None:  # noqa: F811
    server = start(fetch_hosts=("127.0.0.1",), api_keys=("first", "second"))
    heads = [{"Authorization": f"Bearer {key}"} for key in ("first", "second")]
    body = {"input": full(), "webhook": receiver.url, "webhook_events_filter": ["start", "completed"]}
    assert server.ask("POST", "/predictions", json=body, headers=heads[0]).json()["status"] == "succeeded"
    until(lambda: receiver.told("succeeded"))
    own, other = (
        WebhookSigningSecret(**server.ask("GET", "/v1/webhooks/default/secret", headers=head).json())
        for head in heads
    )
    for call in receiver.calls:
        Validator.validate(headers=call.headers, body=call.body.decode(), secret=own)
        with pytest.raises(WebhookValidationError):
            Validator.validate(headers=call.headers, body=call.body.decode(), secret=other)


def test_a_secret_of_the_operators(start: Start) -> None:
    secret = "whsec_" + base64.b64encode(b"known").decode()
    assert client_of(start(webhook_secret=secret)).webhooks.default.secret().key == secret
    for bad in ("", "known", "whsec_", "whsec_!"):
        with pytest.raises(SeekVLError, match="webhook secret"):
            Settings(webhook_secret=bad)


def test_this_network_is_not_called(server: Running, receiver: Receiver) -> None:  # noqa: F811
    name = begin(server, receiver.url)
    until(lambda: server.ask("GET", f"/v1/predictions/{name}").json()["status"] == "succeeded")
    time.sleep(0.3)
    assert receiver.calls == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "gopher://x", "http://", "x", "http://[::1"])
def test_what_is_no_address_is_refused(server: Running, url: str) -> None:
    reply = server.ask("POST", f"/v1/models/{FULL}/predictions", json={"input": full(), "webhook": url})
    assert reply.status_code == 422
    assert reply.json()["detail"].startswith("- webhook: ")


def test_a_server_that_fetches_nothing_calls_nobody(start: Start, receiver: Receiver) -> None:  # noqa: F811
    body = {"input": full(), "webhook": receiver.url}
    reply = start(fetch=False).ask("POST", "/predictions", json=body)
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == ["body", "webhook"]


class Silent(Webhooks):
    """Calls nobody, and notes what it would have done."""

    def __init__(self, *answers: int | None) -> None:
        super().__init__(Settings())
        self.answers, self.asked = list(answers), 0

    async def call(self, url: str, body: bytes, *, name: str, owner: str = "") -> int | None:
        self.asked += 1
        return self.answers.pop(0) if self.answers else None


@pytest.mark.parametrize(
    ("answers", "tries"),
    [((None, 503, 429, 200), 4), ((webhooks.NEVER,), 1), ((400,), 1), ((), webhooks.TRIES)],
)
def test_how_often_the_end_is_told(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[int | None, ...], tries: int
) -> None:
    monkeypatch.setattr(webhooks, "FIRST_PAUSE", 0.0)
    silent = Silent(*answers)
    asyncio.run(silent.insist("http://x", b"", name="msg"))
    assert silent.asked == tries


def test_pauses_grow_up_to_half_a_minute() -> None:
    assert webhooks.pauses()[:4] == [0.1, 0.2, 0.4, 0.8]
    assert webhooks.pauses()[-1] == 30
    assert len(webhooks.pauses()) == webhooks.TRIES - 1


def test_a_call_under_way_is_not_overtaken() -> None:
    async def tell() -> int:
        silent = Silent(200, 200)
        hook = Webhook(webhooks=silent, url="http://x")
        hook.tell("start", dict)
        hook.tell("output", dict)  # the first has not ended
        await silent.close()
        return silent.asked

    assert asyncio.run(tell()) == 1
