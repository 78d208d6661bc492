"""Paths that are not there, and the figures of those that are."""

import openai
import pytest

from seekvl.serve.app import _place
from tests.serve.conftest import Running


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1/nowhere", "/v1/chat/nowhere", "/v1/../../etc/passwd", "/v1"]
)
def test_an_unknown_path_is_told_to_everybody(server: Running, path: str) -> None:
    found = server.ask("GET", path)
    assert found.status_code == 404
    body = found.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["title"] == "Not found"
    assert body["detail"]
    assert body["status"] == 404


def test_a_wrong_method_says_which_are_right(server: Running) -> None:
    found = server.ask("DELETE", "/v1/chat/completions")
    assert found.status_code == 405
    assert found.headers["allow"] == "POST"
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_is_the_clients_own_class(server: Running) -> None:
    client = openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("deepseek-ai/deepseek-vl2")
    assert caught.value.code == "model_not_found"
    assert client.models.retrieve("seekvl/seekvl-nano").owned_by == "seekvl"
    assert server.ask("GET", "/v1/models/seekvl%2Fseekvl-nano").json()["id"] == "seekvl/seekvl-nano"
    assert [model.id for model in client.models.list()] == ["seekvl/seekvl-nano", "seekvl/seekvl-nano-simple"]


def test_the_place_of_a_fault_reads_as_clients_write_it() -> None:
    assert (
        _place(("body", "messages", 0, "content", "list[ContentPart]", 2, "type"))
        == "messages[0].content[2].type"
    )
    assert _place(("body",)) is None
