"""`POST /v1/responses`: the newer dialect of OpenAI's clients, whole or as a stream of named events.

Nothing is kept between requests: a conversation is sent whole each time.
"""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from seekvl.engine.request import Completion
from seekvl.serve import events
from seekvl.serve.chat import Chat, Choice, begin, cancel, extras, finish, likelihoods, note, submit, together
from seekvl.serve.desk import Desk, client_of, desk_of, until_disconnected
from seekvl.serve.errors import ApiError
from seekvl.serve.grounding import Stripper, grounding, strip
from seekvl.serve.notices import limits_met
from seekvl.serve.responses_request import ResponsesRequest, renamed
from seekvl.serve.service import Answering, failure

router = APIRouter()

Status = Literal["in_progress", "completed", "incomplete", "failed"]
Json = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Asked:
    """One request under way."""

    request: ResponsesRequest
    chat: Chat
    item_id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")


@router.post("/v1/responses", tags=["OpenAI"], responses=events.DECLARED)
async def create_response(request: Request, wanted: ResponsesRequest) -> Response:
    """Answer a conversation about pictures."""
    desk, as_chat = desk_of(request), wanted.as_chat()
    async with until_disconnected(request):
        try:
            chat = await begin(request, as_chat, name="resp_")
            answerings = await submit(chat, desk=desk, client=client_of(request))
        except ApiError as error:
            raise renamed(error, shift=int(bool(wanted.instructions))) from error
        asked = Asked(request=wanted, chat=chat)
        if not wanted.stream:
            (choice,) = await finish(chat, answerings, desk=desk)
            return JSONResponse(answered(asked, choice))
    return events.EventStream(stream(asked, answerings, desk=desk), ended=partial(cancel, answerings))


def answered(asked: Asked, choice: Choice) -> Json:
    """Return the body of an answer that is whole."""
    status, completion = status_of(choice.completion), choice.completion
    content = part(asked, completion.text, completion=completion, tokens=choice.tokens)
    return {
        **response(asked, status, output=[item(asked, status, [content])], completion=completion),
        **extras(asked.chat, [completion], met=limits_met(completion, asked=asked.chat.asked_tokens)),
    }


def response(
    asked: Asked,
    status: Status,
    *,
    output: Sequence[Json] = (),
    completion: Completion | None = None,
    error: ApiError | None = None,
) -> Json:
    """Return the object that this dialect turns on, as far as it is known."""
    wanted = asked.request
    params = asked.chat.prepared.params
    form = None if wanted.text is None else wanted.text.format
    return {
        "id": asked.chat.id,
        "object": "response",
        "created_at": asked.chat.created,
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status,
        "background": False,
        "error": None if error is None else {"code": "server_error", "message": error.message},
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": wanted.instructions,
        "max_output_tokens": wanted.max_output_tokens,
        "metadata": {},
        "model": wanted.model,
        "output": list(output),
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True)},
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": wanted.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None if completion is None else usage(completion),
    }


def item(asked: Asked, status: Status, content: Sequence[Json]) -> Json:
    """Return the one item of an answer: a message."""
    return {
        "id": asked.item_id,
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": list(content),
    }


def part(
    asked: Asked,
    text: str,
    *,
    completion: Completion | None = None,
    tokens: Sequence[Mapping[str, object]] = (),
) -> Json:
    """Return the one part of a message: its text, and its boxes when it is whole."""
    stripped = asked.request.strip_tags
    sizes = asked.chat.prepared.inputs.picture_sizes
    boxes = [] if completion is None else grounding(completion.text, sizes=sizes, stripped=stripped)
    return {
        "type": "output_text",
        "text": strip(text) if stripped else text,
        "annotations": [],
        "logprobs": list(tokens),
        **({"grounding": boxes} if boxes else {}),
    }


def status_of(completion: Completion) -> Status:
    """Return how an answer ended."""
    return "completed" if completion.finish_reason == "stop" else "incomplete"


def usage(completion: Completion) -> Json:
    """Count tokens."""
    spent = completion.usage
    return {
        "input_tokens": spent.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": spent.cached_tokens,
            "cache_write_tokens": 0,
            "image_tokens": spent.image_tokens,
        },
        "output_tokens": spent.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": spent.prompt_tokens + spent.completion_tokens,
    }


class Numbered:
    """Writes events with their type and a number that counts from 0."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, kind: str, **fields: object) -> bytes:
        """Write the next event."""
        name, number = f"response.{kind}", self._next
        self._next += 1
        return events.event(name, {"type": name, "sequence_number": number, **fields})


async def stream(asked: Asked, answerings: Sequence[Answering], *, desk: Desk) -> AsyncGenerator[bytes, None]:
    """Yield the events of an answer as its pieces come."""
    write, stripper, tokens = Numbered(), Stripper(), list[dict[str, object]]()
    place = {"item_id": asked.item_id, "output_index": 0, "content_index": 0}
    yield b"".join(opened(asked, write, place))
    try:
        async with contextlib.aclosing(together(answerings)) as coming:
            async for index, pieces in coming:
                written = b""
                for piece in pieces:
                    text, told = piece.text, likelihoods(piece, asked.chat.tokenizer)
                    if asked.request.strip_tags:
                        text = stripper.push(text, last=piece.completion is not None)
                    tokens += told
                    if text or told:
                        written += write("output_text.delta", **place, delta=text, logprobs=told)
                completion = pieces[-1].completion
                if completion is not None:
                    await note(asked.chat, answerings[index], completion, desk=desk, choice=index)
                    choice = Choice(completion=completion, tokens=tokens)
                    written += b"".join(closed(asked, write, place, choice))
                if written:
                    yield written
    except Exception as error:
        yield write("failed", response=response(asked, "failed", error=failure(error)))


def opened(asked: Asked, write: Numbered, place: Mapping[str, object]) -> Iterator[bytes]:
    """Yield the events in front of the text."""
    begun = response(asked, "in_progress")
    yield write("created", response=begun)
    yield write("in_progress", response=begun)
    yield write("output_item.added", output_index=0, item=item(asked, "in_progress", []))
    yield write("content_part.added", **place, part=part(asked, ""))


def closed(asked: Asked, write: Numbered, place: Mapping[str, object], choice: Choice) -> Iterator[bytes]:
    """Yield the events behind the text."""
    whole = answered(asked, choice)
    (message,) = whole["output"]
    (content,) = message["content"]
    yield write("output_text.done", **place, text=content["text"], logprobs=choice.tokens)
    yield write("content_part.done", **place, part=content)
    yield write("output_item.done", output_index=0, item=message)
    yield write(whole["status"], response=whole)
