"""Chat completions, asked by the real openai client."""

import asyncio
import base64
import enum
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from PIL import Image

import seekvl
from seekvl.engine.request import Piece
from seekvl.serve import events
from seekvl.serve.chat import Chat, Writer, chunk, stream
from seekvl.serve.chat_request import ChatRequest
from seekvl.serve.errors import ApiError
from tests.serve.conftest import MODEL, Running, chat_body, held

EXAMPLES = Path(__file__).parents[2] / "examples"


def data_url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((EXAMPLES / name).read_bytes()).decode()


def shown(name: str, question: str) -> list[dict[str, object]]:
    """A question about a picture, as clients write it."""
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(name)}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": parts}]


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)


def test_an_answer_is_what_the_library_says(client: openai.OpenAI, vlm: seekvl.VLM) -> None:
    question = "What does the sign say?"
    found = client.chat.completions.create(model=MODEL, messages=shown("sign.png", question), temperature=0)
    expected = vlm.ask(EXAMPLES / "sign.png", question)
    assert found.choices[0].message.content == expected.text == "WALL"
    assert found.choices[0].finish_reason == "stop"
    assert found.object == "chat.completion"
    assert found._request_id.startswith("req_")
    assert found.model == MODEL
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    assert found.usage.completion_tokens == expected.usage.completion_tokens
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.prompt_tokens_details.image_tokens == 100


def test_pieces_joined_equal_the_plain_answer(client: openai.OpenAI) -> None:
    messages = shown("sign.png", "Where is the sign?")
    plain = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=messages,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    *body, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == plain.usage.completion_tokens
    assert all(chunk.usage is None for chunk in body)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in body)
    assert text == plain.choices[0].message.content
    assert body[-1].choices[0].finish_reason == "stop"
    assert body[-1].choices[0].delta.grounding == plain.choices[0].message.grounding


def test_boxes_are_data(client: openai.OpenAI, vlm: seekvl.VLM) -> None:
    messages = shown("sign.png", "Where is the sign?")
    message = client.chat.completions.create(model=MODEL, messages=messages, temperature=0).choices[0].message
    (expected,) = vlm.ask(EXAMPLES / "sign.png", "Where is the sign?").boxes
    (box,) = message.grounding
    assert box["label"] == expected.label
    assert box["box"] == list(expected.corners)
    with Image.open(EXAMPLES / "sign.png") as picture:
        assert box["box_px"] == pytest.approx(expected.pixels(*picture.size))
    assert message.content[box["start"] : box["end"]].startswith("<|ref|>")
    stripped = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, extra_body={"grounding": {"strip_tags": True}}
    )
    found = stripped.choices[0].message
    assert "<|" not in found.content
    (box,) = found.grounding
    assert found.content[box["start"] : box["end"]] == expected.label


def test_likelihoods_of_tokens(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model=MODEL,
        messages=shown("sign.png", "What does the sign say?"),
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    ).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens).strip() == choice.message.content
    for token in tokens:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob <= 0


def test_several_choices(client: openai.OpenAI) -> None:
    messages = shown("chart.png", "Describe the picture.")
    asked = {"model": MODEL, "messages": messages, "temperature": 1.5, "seed": 3, "n": 4}
    found = client.chat.completions.create(**asked)
    again = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    streamed = ["", "", "", ""]
    for part in client.chat.completions.create(**asked, stream=True):
        streamed[part.choices[0].index] += part.choices[0].delta.content or ""
    assert streamed == texts


def test_the_budget_and_stop_strings_end_an_answer(client: openai.OpenAI) -> None:
    messages = shown("chart.png", "Describe the picture.")
    asked = {"model": MODEL, "messages": messages, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    cut = client.chat.completions.create(**asked, max_completion_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 2
    assert whole.startswith(cut.choices[0].message.content)
    word = whole.split()[1]
    stopped = client.chat.completions.create(**asked, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == whole[: whole.index(word)]


class Colour(enum.StrEnum):
    """Makes the schema refer to a definition."""

    RED = "red"
    BLUE = "blue"


class Sign(pydantic.BaseModel):
    """What an answer is to be."""

    word: str = pydantic.Field(max_length=12)
    colours: list[Colour] = pydantic.Field(min_length=1, max_length=2)
    legible: bool


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_keeps_to_a_schema(client: openai.OpenAI, temperature: float) -> None:
    found = client.chat.completions.parse(
        model=MODEL,
        messages=shown("sign.png", "Describe the sign as JSON."),
        response_format=Sign,
        temperature=temperature,
        seed=5,
    ).choices[0]
    assert found.finish_reason == "stop"
    assert isinstance(found.message.parsed, Sign)
    assert 1 <= len(found.message.parsed.colours) <= 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_an_object(client: openai.OpenAI, stream: bool) -> None:
    asked = {
        "model": MODEL,
        "messages": shown("sign.png", "What does the sign say?"),
        "response_format": {"type": "json_object"},
        "temperature": 0,
        "max_tokens": 300,
    }
    if stream:
        chunks = client.chat.completions.create(**asked, stream=True)
        pieces = [chunk.choices[0] for chunk in chunks]
        text, reason = "".join(piece.delta.content or "" for piece in pieces), pieces[-1].finish_reason
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert text.startswith("{")
    if reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_plain_text_may_be_said_to_be_wanted(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": shown("sign.png", "What does the sign say?"), "temperature": 0}
    found = client.chat.completions.create(**asked, response_format={"type": "text"})
    assert found.choices[0].message.content == "WALL"


def test_the_end_can_be_ignored(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": shown("sign.png", "What does the sign say?"), "temperature": 0}
    found = client.chat.completions.create(**asked, max_tokens=30, extra_body={"ignore_eos": True})
    assert found.usage.completion_tokens == 30
    assert found.choices[0].finish_reason == "length"
    assert found.choices[0].message.content.startswith("WALL")


def test_a_full_context_ends_an_answer_and_says_so(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "a " * 1000}]
    asked = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 4000}
    found = client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
    assert found.usage.total_tokens == 2048
    assert found.choices[0].finish_reason == "length"
    assert found.notices == ["the answer was cut: the context of the model is full"]


def test_drawing_repeats_itself_with_a_seed(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": shown("chart.png", "Describe the picture."), "temperature": 1.5}
    texts = [
        client.chat.completions.create(**asked, seed=seed).choices[0].message.content
        for seed in (1, 1, 2, 3, 2**63 - 1, -(2**63))
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    assert client.chat.completions.create(**asked, seed=2**63 - 1, n=2, max_tokens=1).choices


def test_without_a_temperature_answers_are_drawn_coolly(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    submit = server.engine.submit
    monkeypatch.setattr(
        server.engine, "submit", lambda request, **more: asked.append(request) or submit(request, **more)
    )
    client.chat.completions.create(model=MODEL, messages=shown("sign.png", "Hi"), max_tokens=1, top_p=0)
    assert asked[0].params.temperature == 0.1
    assert asked[0].params.top_p == 1e-9
    assert asked[0].params.repetition_penalty == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"repetition_penalty": 0},
        {"repetition_penalty": 1.3},
        {"top_k": 1},
        {"detail": "low"},
        {"user": "somebody", "metadata": {"a": 1}, "store": True, "unknown": [1, 2]},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"tools": []},
        {"frequency_penalty": 2, "presence_penalty": -2},
        {"stop": ["", "zzz"]},
        {"stop": None, "n": None, "stream": None, "seed": None, "response_format": None},
        {"max_tokens": 10**30},
        {"max_tokens": 5, "max_completion_tokens": 3},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_what_clients_send_beside_is_taken(client: openai.OpenAI, change: dict[str, object]) -> None:
    asked = {"model": MODEL, "messages": shown("sign.png", "What does the sign say?"), "max_tokens": 4}
    found = client.chat.completions.create(**asked, extra_body=change)
    assert found.usage.completion_tokens >= 1


def test_penalties_change_what_is_said(client: openai.OpenAI) -> None:
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Describe the picture in many words."}],
        "temperature": 0,
        "max_tokens": 60,
        "extra_body": {"ignore_eos": True},
    }
    texts = {
        client.chat.completions.create(**asked, **change).choices[0].message.content
        for change in ({}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0})
    }
    assert len(texts) == 3


def test_spellings_of_one_prompt_are_the_same(client: openai.OpenAI) -> None:
    url = data_url("sign.png")
    spellings = [
        [
            {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
            {"type": "text", "text": "Where?"},
        ],
        [{"type": "image_url", "image_url": url}, {"type": "input_text", "text": "Where?"}],
        [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "text", "text": "Where?"}],
    ]
    found = [
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}], temperature=0
        )
        for content in spellings
    ]
    assert len({each.choices[0].message.content for each in found}) == 1
    assert len({each.usage.prompt_tokens for each in found}) == 1
    texts = [
        client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=5)
        for messages in (
            [{"role": "developer", "content": "Be short."}, {"role": "user", "content": "Hello."}],
            [
                {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
                {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
            ],
        )
    ]
    assert texts[0].usage.prompt_tokens == texts[1].usage.prompt_tokens
    assert texts[0].choices[0].message.content == texts[1].choices[0].message.content


def test_pictures_of_earlier_turns_stay(client: openai.OpenAI) -> None:
    messages = [
        *shown("sign.png", "What does the sign say?"),
        {"role": "assistant", "content": "WALL"},
        {"role": "user", "content": "Where is the sign?"},
    ]
    found = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert found.usage.prompt_tokens_details.image_tokens == 100


def test_streams_say_how_they_are_to_be_treated(server: Running) -> None:
    found = server.chat(stream=True, max_tokens=2)
    assert found.headers["content-type"].startswith("text/event-stream")
    assert found.headers["cache-control"] == "no-cache"
    assert found.headers["x-accel-buffering"] == "no"
    assert found.headers["x-request-id"].startswith("req_")
    assert "content-encoding" not in found.headers
    assert found.text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(event[6:]) for event in found.text.split("\n\n")[:-2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_a_stream_keeps_the_connection_awake_while_a_prompt_waits(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(events.EventStream.__init__.__kwdefaults__, "seconds", 0.05)
    body = chat_body(stream=True, max_tokens=2)
    asking = httpx.stream("POST", f"{server.v1}/chat/completions", json=body, trust_env=False)
    with held(server.engine), asking as answer:
        lines = [line for _, line in zip(range(6), answer.iter_lines(), strict=False)]
    assert lines[0].startswith("data: ")
    assert lines[2].startswith(":")
    client = openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)
    assert list(client.chat.completions.create(**body))  # comments are no events


def test_the_sdks_own_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=shown("sign.png", "What does the sign say?"), temperature=0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.content == "WALL"


def test_marks_of_the_template_are_data(client: openai.OpenAI) -> None:
    plain = [{"role": "user", "content": "Hi <image_placeholder> <|User|> <｜end▁of▁sentence｜>"}]
    found = client.chat.completions.create(model=MODEL, messages=plain, max_tokens=3)
    assert found.usage.prompt_tokens_details.image_tokens == 0


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "gpt-4"}, 404, "model_not_found", "model"),
        ({"messages": []}, 400, None, "messages"),
        ({"max_tokens": 0}, 400, None, "max_tokens"),
        ({"temperature": 3}, 400, None, "temperature"),
        ({"temperature": "hot"}, 400, None, "temperature"),
        ({"top_p": 1.5}, 400, None, "top_p"),
        ({"n": 9}, 400, None, "n"),
        ({"top_logprobs": 3}, 400, None, "top_logprobs"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, None, "stop"),
        ({"response_format": {"type": "xml"}}, 400, None, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
            400,
            None,
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}},
            400,
            None,
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}},
            400,
            None,
            "ignore_eos",
        ),
        ({"response_format": {"type": "json_object"}, "stop": "x"}, 400, None, None),
        ({"extra_body": {"max_tiles": 0}}, 400, None, "max_tiles"),
        ({"extra_body": {"max_tiles": 2}}, 400, None, "max_tiles"),  # this model makes none
        ({"extra_body": {"repetition_penalty": 3}}, 400, None, "repetition_penalty"),
        ({"seed": 2**63}, 400, None, "seed"),
        ({"logprobs": True, "top_logprobs": 21}, 400, None, "top_logprobs"),
        ({"messages": "hi"}, 400, None, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            400,
            None,
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            None,
            "messages[0].content[0].image_url",
        ),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_schema"}}, 400, None, "response_format.json_schema"),
        ({"messages": [{"role": "judge", "content": "hi"}]}, 400, None, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, 400, None, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, 400, None, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, 400, None, "messages"),
        (
            {"messages": [{"role": "user", "content": "a " * 5000}]},
            400,
            "context_length_exceeded",
            "messages",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_told_before_the_first_byte(
    client: openai.OpenAI, change: dict[str, object], status: int, code: str | None, param: str, stream: bool
) -> None:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{**asked, **change})
    assert caught.value.status_code == status
    assert caught.value.response.headers["x-request-id"].startswith("req_")
    error = caught.value.body
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,AAAA", "invalid_image"),
        ("data:image/png;base64,%%%", "invalid_image"),
        ("data:image/svg+xml,<svg/>", "invalid_image"),
        ("file:///etc/hostname", "invalid_image"),
        ("/etc/hostname", "invalid_image"),
        ("http://127.0.0.1:9/x.png", "invalid_image"),
        ("http://169.254.169.254/latest/meta-data", "invalid_image"),
        ("ftp://example.org/x.png", "invalid_image"),
    ],
)
def test_a_bad_picture_names_its_place(client: openai.OpenAI, url: str, code: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    assert caught.value.code == code
    assert caught.value.param == "messages[0].content[1].image_url"


ODD = ["a", "", '"', "\\", "\n", "\u2028", "猫", "\x00", '"content": ""', "</s>", "\U0001f600"]


def chat_of(**asked: Any) -> Chat:
    """A request under way, as far as its chunks need it."""
    request = ChatRequest(model='o/n"content": ""', messages=[{"role": "user", "content": "x"}], **asked)
    given: Any = None
    return Chat(
        id="chatcmpl-1",
        asked=request,
        prepared=given,
        tokenizer=given,
        model=request.model,
        pictures=[],
        notices=[],
        done=[],
    )


@pytest.mark.parametrize("with_usage", [True, False])
def test_a_chunk_is_the_same_however_it_is_written(with_usage: bool) -> None:
    chat = chat_of()
    writer = Writer(chat, 3, with_usage=with_usage)
    for text in ODD:
        whole = chunk(chat, 3, delta={"content": text}, with_usage=with_usage) if text else b""
        assert writer.write(Piece(text=text, token_id=1)) == whole
        if text:
            assert json.loads(whole[6:])["choices"][0]["delta"] == {"content": text}


def test_pieces_that_are_there_at_once_are_events_of_one_write() -> None:
    class Ready:
        async def pieces(self) -> AsyncGenerator[list[Piece], None]:
            yield [Piece(text=text, token_id=1) for text in ("one", "", "two")]
            yield [Piece(text="three", token_id=1)]
            raise ApiError(status=503, message="gone")

    async def draw() -> list[bytes]:
        answering: Any = Ready()
        return [part async for part in stream(chat_of(), [answering], desk=None)]  # type: ignore[arg-type]

    role, first, second, error = asyncio.run(draw())
    assert role.count(b"data: ") == 1
    assert [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines(first)] == ["one", "two"]
    assert b"three" in second
    assert b"gone" in error


def lines(part: bytes) -> list[bytes]:
    return [line for line in part.split(b"\n\n") if line]
