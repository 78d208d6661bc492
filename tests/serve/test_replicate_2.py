"""The predictions API, asked by the second generation of the replicate client: `make test-clients`.

It is a beta with other names for the same routes, and cannot stand beside the first in one environment.
"""

import asyncio
import os
from importlib.metadata import version
from typing import Any

import pytest
import replicate

import seekvl
from seekvl.serve.webhooks import signing_key
from tests.serve.conftest import Running, Start
from tests.serve.predicting import (  # noqa: F401 - a fixture
    FULL,
    SIGN,
    SIMPLE,
    WHERE,
    WORD,
    Receiver,
    full,
    receiver,
    simple,
)

pytestmark = pytest.mark.skipif(
    version("replicate").startswith("1."), reason="needs replicate 2: make test-clients brings it"
)


@pytest.fixture
def client(server: Running) -> Any:
    return replicate.Replicate(base_url=server.v1, bearer_token="any", max_retries=0)


def test_run_with_files_and_plain(client: Any, vlm: seekvl.VLM) -> None:
    expected = vlm.ask(SIGN, WHERE, repetition_penalty=1.1).text
    for picture in (SIGN, SIGN.open("rb"), full()["image1"]):
        output = client.run(FULL, input=full(WHERE, image1=picture))
        assert output["text_out"] == expected
        assert output["img_out"].read().startswith(b"\x89PNG")
    as_data = {"image": SIGN.open("rb"), "prompt": WORD, "temperature": 0}
    assert client.run(SIMPLE, input=as_data, file_encoding_strategy="base64") == "WALL"
    assert client.run(SIMPLE, input=simple(), wait=False) == "WALL"
    assert client.run(SIMPLE, input=simple(), wait=5) == "WALL"


def test_run_of_a_version(client: Any) -> None:
    for model, given in ((FULL, full()), (SIMPLE, simple())):
        owner, name = model.split("/")
        version = client.models.get(model_owner=owner, model_name=name).latest_version
        output = client.run(f"{model}:{version.id}", input=given)
        assert output == {FULL: {"img_out": None, "text_out": "WALL"}, SIMPLE: "WALL"}[model]
        (listed,) = client.models.versions.list(model_owner=owner, model_name=name)
        assert listed.id == version.id


def test_a_prediction_is_made_asked_for_and_listed(client: Any) -> None:
    version = client.models.get(model_owner="seekvl", model_name="seekvl-nano-simple").latest_version.id
    made = client.predictions.create(version=version, input=simple())
    found = client.predictions.wait(made.id)
    assert (found.id, found.status, found.output, found.error) == (made.id, "succeeded", "WALL", None)
    assert found.model == SIMPLE
    assert found.version == version
    assert found.data_removed is False
    assert found.urls.get.endswith(made.id)
    assert found.urls.web.startswith("http://127.0.0.1:")
    assert found.completed_at >= found.started_at >= found.created_at
    assert next(iter(client.predictions.list())).id == made.id


def test_cancel(client: Any) -> None:
    made = client.models.predictions.create(
        model_owner="seekvl",
        model_name="seekvl-nano-simple",
        input=simple("Tell me everything.", temperature=1, max_length_tokens=4096),
    )
    assert client.predictions.cancel(prediction_id=made.id).status in ("canceled", "succeeded")
    with pytest.raises(replicate.NotFoundError):
        client.predictions.cancel(prediction_id="unknown")


def test_cancel_after_a_time(client: Any, receiver: Receiver, start: Start) -> None:  # noqa: F811
    slow = start(fetch_hosts=("127.0.0.1",)).v1  # its picture does not come before it is too late
    client = client.copy(base_url=slow)
    asked = {"model_owner": "seekvl", "model_name": "seekvl-nano-simple"}
    inputs = simple(image=f"{receiver.url}/sign.png")
    made = client.models.predictions.create(**asked, input=inputs, cancel_after="5s")
    assert client.predictions.wait(made.id).status == "canceled"
    with pytest.raises(replicate.UnprocessableEntityError) as wrong:
        client.models.predictions.create(**asked, input=inputs, cancel_after="soon")
    assert "Cancel-After" in str(wrong.value)


def test_files(client: Any) -> None:
    about = {"filename": "sign.png", "type": "image/png", "metadata": {"of": "a sign"}}
    made = client.files.create(content=SIGN.read_bytes(), **about)
    assert (made.name, made.content_type) == ("sign.png", "image/png")
    assert made.size == len(SIGN.read_bytes())
    assert made.metadata == {"of": "a sign"}
    assert client.files.get(file_id=made.id).checksums.sha256 == made.checksums.sha256
    assert made.id in [each.id for each in client.files.list()]
    assert client.run(SIMPLE, input={"image": made.urls.get, "prompt": WORD, "temperature": 0}) == "WALL"
    client.files.delete(file_id=made.id)
    with pytest.raises(replicate.NotFoundError):
        client.files.get(file_id=made.id)


def test_use(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "REPLICATE_BASE_URL", server.v1)
    monkeypatch.setitem(os.environ, "REPLICATE_API_TOKEN", "any")
    assert replicate.use(SIMPLE)(**simple()) == "WALL"
    run = replicate.use(FULL).create(**full())
    assert run.output()["text_out"] == "WALL"


def test_errors_are_of_the_clients_classes(client: Any) -> None:
    with pytest.raises(replicate.NotFoundError) as lost:
        client.run("seekvl/unknown", input={})
    assert "seekvl-nano" in str(lost.value)
    with pytest.raises(replicate.UnprocessableEntityError) as wrong:
        client.run(SIMPLE, input=simple(top_p=7))
    assert "input.top_p" in str(wrong.value)
    with pytest.raises(replicate.UnprocessableEntityError):
        client.predictions.create(version="0" * 64, input=simple())


def test_the_secret_of_webhooks(client: Any) -> None:
    assert signing_key(client.webhooks.default.secret.get().key)


def test_several_at_once(server: Running) -> None:
    async def ask() -> list[object]:
        async with replicate.AsyncReplicate(base_url=server.v1, bearer_token="any") as client:
            return await asyncio.gather(*(client.run(SIMPLE, input=simple()) for _ in range(4)))

    assert asyncio.run(ask()) == ["WALL"] * 4
