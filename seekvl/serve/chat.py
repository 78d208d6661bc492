"""`POST /v1/chat/completions`: the OpenAI dialect, whole or as a stream of chunks."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from seekvl.engine.request import Completion, Likelihood, Piece
from seekvl.engine.request import Request as Prepared
from seekvl.processing.conversation import Conversation
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError
from seekvl.serve import events
from seekvl.serve.chat_request import ChatRequest, check_model, conversation, sampling
from seekvl.serve.desk import Desk, client_of, desk_of, owner_of, until_disconnected
from seekvl.serve.errors import ApiError, bad_request, error_event
from seekvl.serve.grounding import Stripper, grounding, strip
from seekvl.serve.notices import limits_met, notices, seen
from seekvl.serve.request_log import Logged, fresh_seed
from seekvl.serve.service import Answering, failure

router = APIRouter()

NO_END = -1
"""An end token that never comes, for `ignore_eos`."""


@dataclass(kw_only=True, slots=True)
class Chat:
    """One request under way: what all its choices share."""

    asked: ChatRequest
    prepared: Prepared
    tokenizer: Tokenizer
    model: str
    pictures: list[dict[str, object]]
    notices: list[str]
    done: list[Completion]
    """Answers that came to their end; the door's log line reads it."""
    id: str
    """Of its answer; also the name under which it is logged."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def asked_tokens(self) -> int | None:
        """Most tokens of an answer, as the caller said."""
        return self.asked.max_completion_tokens or self.asked.max_tokens


@dataclass(kw_only=True, slots=True)
class Choice:
    """One answer, whole."""

    completion: Completion
    tokens: list[dict[str, object]]
    """Its tokens with their likelihoods, where they were asked for."""


@router.post("/v1/chat/completions", tags=["OpenAI"], responses=events.DECLARED)
async def chat_completions(request: Request, asked: ChatRequest) -> Response:
    """Answer a conversation about pictures."""
    desk = desk_of(request)
    async with until_disconnected(request):
        chat = await begin(request, asked)
        answerings = await submit(chat, desk=desk, client=client_of(request))
        if not asked.stream:
            return JSONResponse(whole(chat, await finish(chat, answerings, desk=desk)))
    return events.EventStream(stream(chat, answerings, desk=desk), ended=partial(cancel, answerings))


async def begin(request: Request, asked: ChatRequest, *, name: str = "chatcmpl-") -> Chat:
    """Check a request and turn it into model input. Raises ApiError.

    name: how the id of its answer begins.
    """
    desk = desk_of(request)
    check_model(asked.model, desk.names)
    check_tiles(asked, desk=desk)
    sampling(asked, room=desk.context)  # what cannot be served is told before pictures are fetched
    if desk.log is not None and asked.seed is None:
        asked = asked.model_copy(update={"seed": fresh_seed()})
    given = await conversation(asked.messages, desk=desk.pictures, owner=owner_of(request))
    prepared = await desk.service.prepare(
        given, sampling(asked, room=desk.context), max_tiles=asked.max_tiles
    )
    processor = desk.service.vlm.processor
    chat = Chat(
        id=name + uuid.uuid4().hex,
        asked=asked,
        prepared=replace(prepared, end_id=NO_END if asked.ignore_eos else None),
        tokenizer=processor.tokenizer,
        model=asked.model,
        pictures=seen(prepared.inputs, processor),
        notices=notices(prepared.inputs, processor),
        done=request.state.completions,
    )
    if desk.log is not None:
        await desk.log.request(chat.id, logged(chat, given, room=desk.room(prepared)))
    return chat


def logged(chat: Chat, given: Conversation, *, room: int) -> Logged:
    """Return what is kept of a request where whole requests are."""
    params = [sampling(chat.asked, room=room, choice=choice) for choice in range(chat.asked.choices)]
    return Logged(
        conversation=given,
        params=tuple(params),
        max_tiles=chat.asked.max_tiles,
        end_id=chat.prepared.end_id,
    )


def check_tiles(asked: ChatRequest, *, desk: Desk) -> None:
    """Refuse a bound on tiles where the model makes none. Raises ApiError."""
    if asked.max_tiles is not None:
        try:
            desk.service.vlm.processor.bounded(asked.max_tiles)
        except SeekVLError as error:
            raise bad_request(str(error), param="max_tiles") from error


async def submit(chat: Chat, *, desk: Desk, client: str) -> list[Answering]:
    """Hand all choices to the engine, or none of them. Raises ApiError.

    Where the answer has a form, a thread does it, for its grammar is made then. It goes on where the caller
    hangs up meanwhile, so what it handed in is cancelled when it is done.
    """
    room, loop = desk.room(chat.prepared), asyncio.get_running_loop()
    answerings: list[Answering] = []

    def hand_in() -> None:
        """Hand in every choice."""
        for choice in range(chat.asked.choices):
            params = sampling(chat.asked, room=room, choice=choice)
            prepared = replace(chat.prepared, params=params)
            answerings.append(desk.service.submit(prepared, client=client, loop=loop))

    if chat.asked.response_format is None:
        try:
            hand_in()
        except BaseException:
            cancel(answerings)
            raise
        return answerings

    def give_up(handing: asyncio.Future[None]) -> None:
        """Cancel what was handed in after the caller had gone."""
        handing.exception()  # or the log would say that nobody asked for it
        cancel(answerings)

    handing = asyncio.ensure_future(asyncio.to_thread(hand_in))
    try:
        await asyncio.shield(handing)
    except BaseException as error:
        handing.add_done_callback(give_up)
        if isinstance(error, ApiError) and error.status == 400:
            error.param = "response_format"  # what the engine finds wrong with a request by itself
        raise
    return answerings


def cancel(answerings: Sequence[Answering]) -> None:
    """End the answers that are still under way."""
    for answering in answerings:
        answering.cancel()


async def finish(chat: Chat, answerings: Sequence[Answering], *, desk: Desk) -> list[Choice]:
    """Draw all answers to their end; the first that fails ends the others. Raises ApiError."""
    tokens: list[list[dict[str, object]]] = [[] for _ in answerings]
    completions: dict[int, Completion] = {}
    async with contextlib.aclosing(together(answerings)) as coming:
        async for index, pieces in coming:
            for piece in pieces:
                tokens[index] += likelihoods(piece, chat.tokenizer)
            completion = pieces[-1].completion
            if completion is not None:
                completions[index] = completion
                await note(chat, answerings[index], completion, desk=desk, choice=index)
    return [Choice(completion=completions[index], tokens=told) for index, told in enumerate(tokens)]


async def note(chat: Chat, answering: Answering, completion: Completion, *, desk: Desk, choice: int) -> None:
    """Take down what an answer took, and the answer itself where whole requests are kept."""
    chat.done.append(completion)
    desk.metrics.answered(completion, first_seconds=answering.first_seconds or 0.0)
    if desk.log is not None:
        await desk.log.answer(chat.id, completion, choice=choice)


def whole(chat: Chat, choices: Sequence[Choice]) -> dict[str, object]:
    """Return the body of a plain answer."""
    met = [line for choice in choices for line in limits_met(choice.completion, asked=chat.asked_tokens)]
    return {
        "id": chat.id,
        "object": "chat.completion",
        "created": chat.created,
        "model": chat.model,
        "choices": [_choice(chat, index, choice) for index, choice in enumerate(choices)],
        "usage": usage([choice.completion for choice in choices]),
        **extras(chat, [choice.completion for choice in choices], met=met),
    }


def _choice(chat: Chat, index: int, choice: Choice) -> dict[str, object]:
    text = choice.completion.text
    message: dict[str, object] = {
        "role": "assistant",
        "content": strip(text) if chat.asked.strip_tags else text,
        "refusal": None,
    }
    boxes = grounding(text, sizes=chat.prepared.inputs.picture_sizes, stripped=chat.asked.strip_tags)
    if boxes:
        message["grounding"] = boxes
    return {
        "index": index,
        "message": message,
        "logprobs": {"content": choice.tokens, "refusal": None} if chat.asked.logprobs else None,
        "finish_reason": finish_reason(choice.completion),
    }


def finish_reason(completion: Completion) -> Literal["stop", "length"]:
    """Return why an answer ended, in the words of the dialect; one cut by its time is too short, too."""
    return "stop" if completion.finish_reason == "stop" else "length"


def usage(completions: Sequence[Completion]) -> dict[str, object]:
    """Count tokens: the prompt once, the answers together."""
    first = completions[0].usage
    answered = sum(completion.usage.completion_tokens for completion in completions)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": answered,
        "total_tokens": first.prompt_tokens + answered,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens, "image_tokens": first.image_tokens},
    }


def extras(chat: Chat, completions: Sequence[Completion], *, met: Sequence[str]) -> dict[str, object]:
    """Return what the dialect does not know: notices, what was seen of the pictures, seconds spent."""
    timings = completions[0].timings
    return {
        "notices": [*chat.notices, *met],
        "pictures": chat.pictures,
        "timings": {
            "preprocess": timings.preprocess,
            "vision": timings.vision,
            "prefill": timings.prefill,
            "decode": timings.decode,
        },
    }


def likelihoods(piece: Piece, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """Return the token of a piece with its log-probability; nothing where none was asked for."""
    if piece.token_id is None or piece.likelihood is None:
        return []
    told: Likelihood = piece.likelihood
    top = [_token(tokenizer, token, logprob) for token, logprob in told.top]
    return [{**_token(tokenizer, piece.token_id, told.logprob), "top_logprobs": top}]


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, object]:
    raw = tokenizer.token_bytes(token, skip_specials=False)
    return {"token": raw.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(raw)}


async def stream(chat: Chat, answerings: Sequence[Answering], *, desk: Desk) -> AsyncGenerator[bytes, None]:
    """Yield the events of all choices as their pieces come, then the usage and the end.

    Events that are there at once are yielded at once.
    """
    with_usage = chat.asked.stream_options is not None and chat.asked.stream_options.include_usage
    completions: dict[int, Completion] = {}
    writers = [Writer(chat, index, with_usage=with_usage) for index in range(len(answerings))]
    role: dict[str, object] = {"role": "assistant", "content": ""}
    yield b"".join(chunk(chat, each.index, delta=role, with_usage=with_usage) for each in writers)
    try:
        async with contextlib.aclosing(together(answerings)) as coming:
            async for index, pieces in coming:
                written = b"".join(map(writers[index].write, pieces))
                completion = pieces[-1].completion
                if completion is not None:
                    completions[index] = completion
                    await note(chat, answerings[index], completion, desk=desk, choice=index)
                    written += last_chunk(chat, index, completion, with_usage=with_usage)
                if written:
                    yield written
    except Exception as error:
        yield events.data(error_event(failure(error)))
        return
    if with_usage:
        ended = [completions[index] for index in sorted(completions)]
        yield events.data({**_head(chat), "choices": [], "usage": usage(ended)})
    yield events.data("[DONE]")


class Writer:
    """Writes the pieces of a choice as chunks; what all of them share is encoded once."""

    def __init__(self, chat: Chat, index: int, *, with_usage: bool) -> None:
        self.index = index
        self._chat, self._with_usage, self._stripper = chat, with_usage, Stripper()
        mark = '"content": ""'  # of the last field but constants: a model's name cannot hold it unescaped
        empty = chunk(chat, index, delta={"content": ""}, with_usage=with_usage).decode()
        before, _, self._after = empty.rpartition(mark)
        self._before = before + mark.removesuffix('""')

    def write(self, piece: Piece) -> bytes:
        """Return the chunk of a piece; nothing where it has neither letters nor likelihoods."""
        text, tokens = piece.text, likelihoods(piece, self._chat.tokenizer)
        if self._chat.asked.strip_tags:
            text = self._stripper.push(text, last=piece.completion is not None)
        if tokens:
            delta: dict[str, object] = {"content": text}
            return chunk(self._chat, self.index, delta=delta, tokens=tokens, with_usage=self._with_usage)
        if not text:
            return b""
        return f"{self._before}{events.encode(text)}{self._after}".encode()


def last_chunk(chat: Chat, index: int, completion: Completion, *, with_usage: bool) -> bytes:
    """Return the chunk that ends a choice, with its boxes and what else is only known now."""
    sizes = chat.prepared.inputs.picture_sizes
    boxes = grounding(completion.text, sizes=sizes, stripped=chat.asked.strip_tags)
    met = limits_met(completion, asked=chat.asked_tokens)
    return chunk(
        chat,
        index,
        delta={"grounding": boxes} if boxes else {},
        reason=finish_reason(completion),
        more=extras(chat, [completion], met=met),
        with_usage=with_usage,
    )


def chunk(
    chat: Chat,
    index: int,
    *,
    delta: dict[str, object],
    with_usage: bool,
    tokens: Sequence[dict[str, object]] = (),
    reason: str | None = None,
    more: dict[str, object] | None = None,
) -> bytes:
    """Write a chunk as an event."""
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": {"content": list(tokens), "refusal": None} if tokens else None,
        "finish_reason": reason,
    }
    counted = {"usage": None} if with_usage else {}
    return events.data({**_head(chat), "choices": [choice], **counted, **(more or {})})


def _head(chat: Chat) -> dict[str, object]:
    return {
        "id": chat.id,
        "object": "chat.completion.chunk",
        "created": chat.created,
        "model": chat.model,
    }


async def together(answerings: Sequence[Answering]) -> AsyncGenerator[tuple[int, list[Piece]], None]:
    """Yield the pieces of several answers as they come; leaving early cancels all of them."""
    if len(answerings) == 1:  # without the detour, which every token would take
        async with contextlib.aclosing(answerings[0].pieces()) as coming:
            async for pieces in coming:
                yield 0, pieces
        return
    arrived: asyncio.Queue[tuple[int, list[Piece] | Exception]] = asyncio.Queue()

    async def draw(index: int, answering: Answering) -> None:
        """Pass the pieces of one choice on."""
        try:
            async for pieces in answering.pieces():
                arrived.put_nowait((index, pieces))
        except Exception as error:
            arrived.put_nowait((index, error))

    drawing = [asyncio.create_task(draw(index, each)) for index, each in enumerate(answerings)]
    try:
        left = len(answerings)
        while left:
            index, came = await arrived.get()
            if isinstance(came, Exception):
                raise came
            yield index, came
            left -= came[-1].completion is not None
    finally:
        cancel(answerings)  # a task that has not begun yet would not
        for task in drawing:
            task.cancel()
        await asyncio.gather(*drawing, return_exceptions=True)
