"""Chat completions, asked by the real openai client."""

import base64
from pathlib import Path

import openai
import pytest
from PIL import Image

import seekvl
from tests.serve.conftest import Running

MODEL = "seekvl/seekvl-nano"
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
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
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
