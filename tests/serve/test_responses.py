"""The responses API, asked by the real openai client."""

import json

import openai
import pydantic
import pytest

import seekvl
from seekvl.engine.engine import Engine
from tests.serve.conftest import MODEL, Running, Start
from tests.serve.test_chat import EXAMPLES, data_url

ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def shown(name: str, question: str) -> list[dict[str, object]]:
    parts = [
        {"type": "input_image", "image_url": data_url(name), "detail": "auto"},
        {"type": "input_text", "text": question},
    ]
    return [{"role": "user", "content": parts}]


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)


def test_an_answer_is_what_the_library_says(client: openai.OpenAI, vlm: seekvl.VLM) -> None:
    question = "What does the sign say?"
    found = client.responses.create(model=MODEL, input=shown("sign.png", question), temperature=0)
    alone = vlm.ask(EXAMPLES / "sign.png", question)
    assert found.output_text == alone.text == "WALL"
    assert found.id.startswith("resp_")
    assert found.object == "response"
    assert found.status == "completed"
    assert found.error is None
    assert found.incomplete_details is None
    assert found.usage.input_tokens == alone.usage.prompt_tokens
    assert found.usage.output_tokens == alone.usage.completion_tokens
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert found.usage.output_tokens_details.reasoning_tokens == 0
    (message,) = found.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert message.content[0].annotations == []
    assert found.model_extra["notices"] == ["picture 1 of 290x200 px was scaled down to 256x176 px"]


def test_words_alone_and_instructions(client: openai.OpenAI) -> None:
    plain = client.responses.create(model=MODEL, input="Hello.", max_output_tokens=3, temperature=0)
    told = client.responses.create(
        model=MODEL, input="Hello.", instructions="Be short.", max_output_tokens=3, temperature=0
    )
    as_items = client.responses.create(
        model=MODEL,
        input=[{"role": "developer", "content": "Be short."}, {"role": "user", "content": "Hello."}],
        max_output_tokens=3,
        temperature=0,
    )
    assert told.usage.input_tokens != plain.usage.input_tokens
    assert told.usage.input_tokens == as_items.usage.input_tokens
    assert told.output_text == as_items.output_text


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    asked = shown("sign.png", "What does the sign say?")
    first = client.responses.create(model=MODEL, input=asked, temperature=0)
    again = [*asked, *(item.model_dump() for item in first.output)]
    second = client.responses.create(
        model=MODEL, input=[*again, {"role": "user", "content": "Where is the sign?"}], temperature=0
    )
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert second.output[0].content[0].grounding


def test_a_cut_answer_says_why(client: openai.OpenAI) -> None:
    found = client.responses.create(
        model=MODEL, input=shown("chart.png", "Describe the picture."), max_output_tokens=2, temperature=0
    )
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.usage.output_tokens == 2


def test_events_come_in_order_and_say_the_same(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "input": shown("sign.png", "Where is the sign?"), "temperature": 0}
    plain = client.responses.create(**asked)
    found = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert list(dict.fromkeys(event.type for event in found)) == ORDER
    deltas = [event for event in found if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == plain.output_text
    assert found[-5 + 1].text == plain.output_text
    assert found[-1].response.output_text == plain.output_text
    assert found[-1].response.output[0].content[0].grounding == plain.output[0].content[0].grounding
    assert found[0].response.status == "in_progress"
    assert {event.item_id for event in deltas} == {found[-1].response.output[0].id}


def test_a_cut_stream_ends_incomplete(client: openai.OpenAI) -> None:
    found = list(
        client.responses.create(model=MODEL, input="Hello.", max_output_tokens=1, temperature=0, stream=True)
    )
    assert found[-1].type == "response.incomplete"
    assert found[-1].response.status == "incomplete"


def test_the_sdks_own_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model=MODEL, input=shown("sign.png", "What does the sign say?"), temperature=0
    ) as stream:
        assert [event.type for event in stream][-1] == "response.completed"
        assert stream.get_final_response().output_text == "WALL"


class Sign(pydantic.BaseModel):
    word: str = pydantic.Field(max_length=10)
    legible: bool


def test_an_answer_keeps_to_a_schema(client: openai.OpenAI) -> None:
    found = client.responses.parse(
        model=MODEL, input=shown("sign.png", "Describe the sign."), text_format=Sign, temperature=0
    )
    assert isinstance(found.output_parsed, Sign)
    as_object = client.responses.create(
        model=MODEL,
        input="Hello.",
        text={"format": {"type": "json_object"}},
        temperature=0,
        max_output_tokens=60,
    )
    assert as_object.output_text.startswith("{")
    if as_object.status == "completed":
        json.loads(as_object.output_text)


def test_likelihoods_and_stripped_marks(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "input": shown("sign.png", "Where is the sign?"), "temperature": 0}
    extra = {"grounding": {"strip_tags": True}}
    found = client.responses.create(
        **asked, include=["message.output_text.logprobs"], top_logprobs=2, extra_body=extra
    )
    content = found.output[0].content[0]
    assert "<|" not in content.text
    assert content.grounding
    assert all(len(token.top_logprobs) == 2 for token in content.logprobs)
    streamed = list(client.responses.create(**asked, stream=True, extra_body=extra))
    text = "".join(event.delta for event in streamed if event.type == "response.output_text.delta")
    assert text == content.text


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"input": []}, 400, "input"),
        ({"input": [{"role": "judge", "content": "hi"}]}, 400, "input[0].role"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]}, 400, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            400,
            "input[0].content[0].image_url",
        ),
        (
            {
                "instructions": "Be short.",
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/x"}]}
                ],
            },
            400,
            "input[0].content[0].image_url",
        ),
        ({"input": "a " * 5000}, 400, "input"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"background": True}, 400, "background"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "no"}}}},
            400,
            "text.format",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_names_its_place(
    client: openai.OpenAI, change: dict[str, object], status: int, param: str, stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(**{"model": MODEL, "input": "hi", "stream": stream, **change})
    assert caught.value.status_code == status
    assert caught.value.body["param"] == param


def test_a_stream_that_breaks_says_so(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    client = openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)
    stream = client.responses.create(model=MODEL, input="Hi", stream=True, extra_body={"ignore_eos": True})
    assert next(iter(stream)).type == "response.created"

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Engine, "_decode", broken)
    last = list(stream)[-1]
    assert last.type == "response.failed"
    assert last.response.error.code == "server_error"
    assert "log" in last.response.error.message
