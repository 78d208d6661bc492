"""What the OpenAI dialect asks for, checked, and turned into a conversation and sampling parameters.

Fields that mean nothing here (`user`, `metadata`, `store`, unknown ones) are ignored: a server that rejects
them breaks clients. A field that would change the answer and cannot be served is an error.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from seekvl.engine.request import Form, SamplingParams
from seekvl.processing.conversation import Conversation, Message, Part, Picture, Text
from seekvl.runtime import SeekVLError
from seekvl.serve.errors import ApiError, bad_request
from seekvl.serve.pictures import PictureDesk

TEMPERATURE = 0.1
"""When the caller says nothing: what the published ports and demos sample with, in every dialect."""
MOST_CHOICES = 8
MOST_STOPS = 4
MOST_LOGPROBS = 20
MOST_SCHEMA = 65_536
"""Letters of a JSON schema, written out: making a grammar of it takes time that grows faster than it."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


Detail = Literal["auto", "low", "high", "original"]
"""How closely to look; the last is a newer word for "high"."""


class Loose(BaseModel):
    """A part of a request; what it does not know it ignores."""

    model_config = ConfigDict(extra="ignore")


class ImageUrl(Loose):
    """The address of a picture and how closely to look."""

    url: StrictStr
    detail: Detail = "auto"


class ContentPart(Loose):
    """Words or a picture, in the spelling of chat completions or of responses."""

    type: Literal["text", "input_text", "output_text", "image_url", "input_image"]
    text: StrictStr | None = None
    image_url: ImageUrl | StrictStr | None = None
    detail: Detail = "auto"


class ChatMessage(Loose):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None


class JsonSchema(Loose):
    """A schema that the answer has to keep to."""

    name: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Loose):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Loose):
    """What a stream ends with."""

    include_usage: StrictBool = False


class Grounding(Loose):
    """What is done with the marks of boxes."""

    strip_tags: StrictBool = False


class Sampled(Loose):
    """What requests for answers share: the model, how words are drawn, and the fields that are ours."""

    model: StrictStr
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(fail_fast=True)] | None = None
    stream: StrictBool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0, le=2)] | None = None
    max_tiles: Annotated[StrictInt, Field(ge=1)] | None = None
    grounding: Grounding | None = None
    ignore_eos: StrictBool = False

    @property
    def strip_tags(self) -> bool:
        """Whether the marks of boxes are taken out of the text."""
        return self.grounding is not None and self.grounding.strip_tags


class ChatRequest(Sampled):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]  # each fault takes memory
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = None
    logprobs: StrictBool | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None

    @property
    def choices(self) -> int:
        """How many answers are asked for."""
        return self.n or 1


def sampling(request: ChatRequest, *, room: int, choice: int = 0) -> SamplingParams:
    """Return how choice number `choice` is sampled; `room` is what the context holds.

    Raises ApiError for what cannot be served.
    """
    if request.tools and request.tool_choice != "none":
        raise bad_request(
            "these models were not trained to call tools: leave tools out, or say tool_choice 'none'",
            param="tools",
            code="unsupported_parameter",
        )
    if request.ignore_eos and form(request.response_format) is not None:
        raise bad_request("an answer of a given form ends with it: leave ignore_eos out", param="ignore_eos")
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", param="top_logprobs")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MOST_STOPS:
        raise bad_request(f"stop holds {len(stops)} texts, at most {MOST_STOPS} are taken", param="stop")
    asked = request.max_completion_tokens or request.max_tokens or room
    try:
        return SamplingParams(
            max_new_tokens=min(asked, room),
            temperature=TEMPERATURE if request.temperature is None else request.temperature,
            top_p=request.top_p or (1.0 if request.top_p is None else 1e-9),  # 0: the likeliest alone
            top_k=request.top_k,
            repetition_penalty=request.repetition_penalty or 1.0,  # 0 is off, as in the published ports
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            seed=None if request.seed is None else request.seed + choice,
            stop=tuple(text for text in stops if text) or None,
            constrain=form(request.response_format),
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
    except SeekVLError as error:
        raise bad_request(str(error)) from error


def form(wanted: ResponseFormat | None) -> Form | None:
    """Return what an answer is held to. Raises ApiError for a schema that is not there, or too large."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return "json"
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad_request(
            "response_format json_schema needs json_schema.schema", param="response_format.json_schema"
        )
    schema = wanted.json_schema.schema_
    letters = len(json.dumps(schema))
    if letters > MOST_SCHEMA:
        raise bad_request(
            f"the schema has {letters:,} letters, at most {MOST_SCHEMA:,} are taken",
            param="response_format.json_schema",
        )
    return schema


async def conversation(messages: Sequence[ChatMessage], *, desk: PictureDesk, owner: str) -> Conversation:
    """Turn messages into a conversation, its pictures opened; files are those of their owner.

    System and developer messages in front make one system text; neighbours of one role are one turn. Marks
    of the template in any text are data. Raises ApiError naming the field.
    """
    desk.check_count(
        sum(
            part.type in ("image_url", "input_image")
            for message in messages
            if isinstance(message.content, list)
            for part in message.content
        ),
        param="messages",
    )
    systems: list[str] = []
    turns: list[Message] = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        if message.role == "tool":
            raise bad_request("these models know no tools, so no tool can answer", param=f"{param}.role")
        parts = await _parts(message, param=param, desk=desk, owner=owner)
        if message.role == "system" or message.role == "developer":
            systems.append(_system_text(parts, after_turns=bool(turns), param=param))
        elif turns and turns[-1].role == message.role:
            turns[-1] = Message(message.role, (*turns[-1].parts, Text("\n"), *parts))
        else:
            turns.append(Message(message.role, tuple(parts)))
    try:
        return Conversation(tuple(turns), "\n\n".join(systems) if systems else None)
    except SeekVLError as error:
        raise bad_request(str(error), param="messages") from error


def _system_text(parts: Sequence[Part], *, after_turns: bool, param: str) -> str:
    if after_turns:
        raise bad_request("a system message may only stand in front", param=f"{param}.role")
    if any(isinstance(part, Picture) for part in parts):
        raise bad_request(
            "a system message shows no pictures; show it in a user message", param=f"{param}.content"
        )
    return "".join(part.text for part in parts if isinstance(part, Text))


async def _parts(message: ChatMessage, *, param: str, desk: PictureDesk, owner: str) -> list[Part]:
    """Read the content of a message; a text and a list with one text part are the same."""
    if message.content is None:
        raise bad_request("the message has no content", param=f"{param}.content")
    if isinstance(message.content, str):
        return [Text(message.content)]
    read: list[Part] = []
    for index, part in enumerate(message.content):
        place = f"{param}.content[{index}]"
        if part.type in ("image_url", "input_image"):
            if part.image_url is None:
                raise bad_request("the part has no image_url", param=f"{place}.image_url")
            given = part.image_url
            address = ImageUrl(url=given, detail=part.detail) if isinstance(given, str) else given
            image: Image.Image = await desk.open(address.url, param=f"{place}.image_url", owner=owner)
            read.append(Picture(image, detail="high" if address.detail == "original" else address.detail))
        elif part.text is None:
            raise bad_request("the part has no text", param=f"{place}.text")
        else:
            read.append(Text(part.text))
    return read


def check_model(asked: str, known: Sequence[str]) -> None:
    """Refuse a model that is not served. Raises ApiError (404)."""
    if asked not in known:
        raise ApiError(
            status=404,
            message=f"the model {asked!r} is not served here; known are {', '.join(known)}",
            code="model_not_found",
            param="model",
        )
