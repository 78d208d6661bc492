"""From prompt to answer: fill the cache with each prompt, then one token for every row a step.

Prompts are computed one at a time: each gives the same numbers alone and in a batch. Answers grow together.

Letters: n rows, t tokens of a prompt, s slots of a picture or of several, v vocabulary, d language width.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seekvl.engine.budget import free_bytes, prefill_tokens, tower_tiles
from seekvl.engine.cache import KVCache
from seekvl.engine.constrain import constraint_for
from seekvl.engine.kernels.decoder import decode
from seekvl.engine.prefix import Prefix, picture_digests, picture_places, picture_tiles
from seekvl.engine.reply import Reply
from seekvl.engine.request import Completion, FinishReason, Piece, Request, Timings, Usage
from seekvl.engine.sampler import Sampler, choose
from seekvl.models.vl import VL
from seekvl.models.vl2 import VL2, AnyVL
from seekvl.processing.encode import ModelInput
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError


@dataclass(kw_only=True, slots=True)
class Clock:
    """Seconds spent on one answer so far."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(kw_only=True, slots=True)
class Row:
    """An answer under way."""

    request: Request
    reply: Reply
    sampler: Sampler
    end_id: int
    room: int
    """Tokens it may still have."""
    cached: int = 0
    clock: Clock = field(default_factory=Clock)
    done: bool = False

    def take(self, token: int) -> Piece:
        """Add a token to the answer."""
        if token == self.end_id:
            return self.end("stop")
        self.sampler.generated.append(token)
        self.room -= 1
        text = self.reply.push(token)
        if self.reply.stopped:
            return self.end("stop", text=text, token=token)
        if self.room == 0:
            return self.end("length", text=text, token=token)
        return Piece(text=text, token_id=token)

    def end(self, reason: FinishReason, *, text: str = "", token: int | None = None) -> Piece:
        """Finish the answer; `text` and `token` come from its last token."""
        self.done = True
        text += self.reply.finish()
        ids, bill, clock = self.sampler.generated, self.request.inputs.bill, self.clock
        completion = Completion(
            token_ids=tuple(ids),
            text=self.reply.text,
            pictures=len(bill.image_tokens),
            begun=self.request.begun,
            finish_reason="stop" if self.reply.stopped else reason,
            usage=Usage(
                prompt_tokens=bill.total,
                image_tokens=sum(bill.image_tokens),
                completion_tokens=len(ids),
                cached_tokens=self.cached,
            ),
            timings=Timings(
                preprocess=self.request.preprocess_seconds,
                vision=clock.vision,
                prefill=clock.prefill,
                decode=clock.decode,
            ),
        )
        return Piece(text=text, token_id=token, completion=completion)


def generate(
    model: AnyVL,
    tokenizer: Tokenizer,
    *,
    requests: Sequence[Request],
    prefix: Prefix | None = None,
    chunk: int | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Generator[tuple[int, Piece], None, None]:
    """Answer requests together; yield (index of the request, its next piece) until each had its last piece.

    prefix: the conversation so far, for a single request; shared tokens are not computed again.
    chunk: most prompt tokens in one forward pass, to bound memory; None takes the prompt as a whole where it
    fits into free memory.
    cancel: asked before every step; True ends all answers as "cancelled". Closing the iterator stops as well,
    and both leave `prefix` as it is after the last whole step. An answer that reaches the model's longest
    sequence ends there, as "length".

    Raises SeekVLError, before anything is computed, for a prompt that leaves no room for an answer.
    """
    if chunk is not None and chunk < 1:
        raise SeekVLError(f"chunk must be at least 1 token, not {chunk}")
    if prefix is not None and len(requests) != 1:
        raise SeekVLError(f"a conversation's cache serves 1 request at a time, not {len(requests)}")
    rows = [_start(model, tokenizer, request) for request in requests]
    return _run(model, rows, prefix=prefix, chunk=chunk, cancel=cancel)


def _start(model: AnyVL, tokenizer: Tokenizer, request: Request) -> Row:
    """Make the row of a request, if it has room for an answer."""
    prompt, limit = len(request.inputs.input_ids), model.config.language.max_positions
    if prompt + 1 > limit:
        raise SeekVLError(
            f"the prompt takes {prompt:,} tokens and the model's longest sequence is {limit:,}: "
            "no room for an answer; shorten the prompt"
        )
    params = request.params
    end_id = tokenizer.eos_id if request.end_id is None else request.end_id
    room = min(params.max_new_tokens, limit - prompt)
    constraint = constraint_for(params.constrain, tokenizer, end_id=end_id, room=room, begun=request.begun)
    return Row(
        request=request,
        reply=Reply(tokenizer.stream(), stops=params.stops, strip=request.strip),
        sampler=Sampler(params=params, prompt=_counted(request), constraint=constraint),
        end_id=end_id,
        room=room,
    )


def _counted(request: Request) -> frozenset[int]:
    """Return the tokens of the prompt that the repetition penalty counts."""
    counts = request.penalise_prompt and request.params.repetition_penalty != 1.0
    return frozenset(request.inputs.input_ids.tolist()) if counts else frozenset()


def _run(
    model: AnyVL,
    rows: list[Row],
    *,
    prefix: Prefix | None,
    chunk: int | None,
    cancel: Callable[[], bool] | None,
) -> Generator[tuple[int, Piece], None, None]:
    """Do the work of `generate`. The first len(active) rows of the cache belong to the rows active names."""
    if not rows:
        return
    cache = _new_cache(model, rows=len(rows)) if prefix is None else prefix.cache
    seen: dict[bytes, Tensor] | None = {} if len(rows) > 1 else None
    first = []
    for index, row in enumerate(rows):
        if cancel is not None and cancel():
            break
        if prefix is not None:
            row.cached = prefix.reuse(row.request.inputs)
        inputs = row.request.inputs
        first.append(prefill(model, inputs, cache=cache, row=index, chunk=chunk, clock=row.clock, seen=seen))
    active = list(range(len(rows)))
    logits = torch.stack(first) if len(first) == len(rows) else None  # n v
    while active:
        if logits is None or (cancel is not None and cancel()):
            for index in active:
                yield index, rows[index].end("cancelled")
            return
        began = time.perf_counter()
        tokens = choose(logits, [rows[index].sampler for index in active])
        _count(rows, active, time.perf_counter() - began)
        for index, token in zip(active, tokens, strict=True):
            yield index, rows[index].take(token)
        _drop_finished(rows, active, tokens, cache=cache)
        if active:
            began = time.perf_counter()
            if prefix is not None:
                prefix.append(tokens[0])
            logits = step(model, tokens, cache=cache)
            _count(rows, active, time.perf_counter() - began)


def _drop_finished(rows: list[Row], active: list[int], tokens: list[int], *, cache: KVCache) -> None:
    """Fill the gaps that finished rows leave with the last row, so that the rows in use stay the first."""
    for slot in reversed(range(len(active))):
        if rows[active[slot]].done:
            cache.move(len(active) - 1, slot)
            for column in (active, tokens):
                column[slot] = column[-1]
                column.pop()


def _count(rows: list[Row], active: list[int], seconds: float) -> None:
    """Add the time of a step to every answer that took part in it."""
    for index in active:
        rows[index].clock.decode += seconds


def _new_cache(model: AnyVL, *, rows: int) -> KVCache:
    """Make an empty cache beside the model's weights."""
    weight = model.language.embed_tokens.weight
    return KVCache(model.config.language, rows=rows, device=weight.device, dtype=weight.dtype)


@torch.inference_mode()
def prefill(
    model: AnyVL,
    inputs: ModelInput,
    *,
    cache: KVCache,
    row: int,
    chunk: int | None = None,
    clock: Clock | None = None,
    seen: dict[bytes, Tensor] | None = None,
) -> Tensor:
    """Fill a row of the cache with what it lacks of a prompt; return the logits f32[v] of the token after it.

    Only the last position goes through the head. `seen`: see `embed_prompt`.
    """
    clock = Clock() if clock is None else clock
    start = cache.lengths[row]
    embeds = embed_prompt(model, inputs, start=start, clock=clock, seen=seen)  # 1 t d
    began = time.perf_counter()
    hidden = embeds
    for part in prefill_hidden(model, embeds, cache=cache, row=row, chunk=chunk):
        hidden = part
    logits = model.head(hidden[0, -1]).float()
    _wait(logits)
    clock.prefill += time.perf_counter() - began
    return logits


def prefill_hidden(
    model: AnyVL, embeds: Tensor, *, cache: KVCache, row: int, chunk: int | None = None
) -> Iterator[Tensor]:
    """Feed embeddings f[1, t, d] to a row of the cache, piece by piece; yield each piece's hidden states.

    The cache stays where it is; a piece sees what stands before it there.
    """
    start = cache.lengths[row]
    total = start + embeds.shape[1]
    cache.reserve(total)
    if chunk is None:
        chunk = prefill_tokens(
            model.config.language,
            total=total,
            itemsize=embeds.element_size(),
            free=free_bytes(embeds.device),
        )
    view = cache.row(row)
    for begin in range(start, total, chunk):
        part = embeds[:, begin - start : begin - start + chunk]
        positions = torch.arange(begin, begin + part.shape[1], device=part.device).unsqueeze(0)
        hidden = model.hidden(part, positions=positions, mask=view.mask(part.shape[1]), cache=view)
        view.advance(part.shape[1])
        yield hidden


@torch.inference_mode()
def step(model: AnyVL, tokens: Sequence[int], *, cache: KVCache) -> Tensor:
    """Feed one token of each of the first n rows; return the logits f32[n, v] of the next.

    On the CPU the whole step runs in the kernels where they serve the network, see `kernels.decoder`.
    """
    n = len(tokens)
    cache.reserve(max(cache.lengths[:n]) + 1)
    if type(model) in (VL, VL2):  # a subclass may do more than its language model
        keys, values = cache.buffers
        logits = decode(
            model.language, tokens, slots=range(n), positions=cache.lengths[:n], keys=keys, values=values
        )
        if logits is not None:
            cache.advance(n)
            return logits
    ids = torch.tensor(tokens, device=model.language.embed_tokens.weight.device).unsqueeze(1)  # n 1
    hidden = model.hidden(
        model.embed(ids), positions=cache.positions(n), mask=cache.mask(n), cache=cache
    )  # n 1 d
    cache.advance(n)
    return model.head(hidden[:, 0]).float()


@torch.inference_mode()
def embed_prompt(
    model: AnyVL,
    inputs: ModelInput,
    *,
    start: int = 0,
    clock: Clock | None = None,
    seen: dict[bytes, Tensor] | None = None,
) -> Tensor:
    """Return the embeddings f[1, t, d] of a prompt from token `start` on, which is inside no picture.

    Pictures go through the towers one at a time: a picture's features do not depend on its company, and
    memory does not grow with their number. Without pictures to encode the towers do not run. `seen` keeps the
    features of pictures by fingerprint, for prompts that show the same ones; it is read and added to.
    """
    weight = model.language.embed_tokens.weight
    ids = inputs.input_ids[None, start:].to(weight.device)
    mask = inputs.image_mask[None, start:].to(weight.device)
    features = None
    done = sum(end <= start for _, end in picture_places(inputs))
    if done < len(inputs.bill.image_tokens):
        began = time.perf_counter()
        features = _encode_pictures(model, inputs, first=done, seen=seen)  # s d
        _wait(features)
        if clock is not None:
            clock.vision += time.perf_counter() - began
    return model.embed(ids, image_mask=mask, image_features=features)


def _encode_pictures(
    model: AnyVL, inputs: ModelInput, *, first: int, seen: dict[bytes, Tensor] | None
) -> Tensor:
    """Return the rows f[s, d] of the pictures from `first` on, one after the other."""
    places = picture_tiles(inputs)
    digests = [b""] * len(places) if seen is None else picture_digests(inputs)
    rows = []
    for index in range(first, len(places)):
        features = None if seen is None else seen.get(digests[index])
        if features is None:
            features = _encode_picture(model, inputs, index=index, tiles=places[index])
        if seen is not None:
            seen[digests[index]] = features
        rows.append(features)
    return torch.cat(rows)


def _encode_picture(model: AnyVL, inputs: ModelInput, *, index: int, tiles: slice) -> Tensor:
    """Return the rows f[s, d] of one picture."""
    weight = model.language.embed_tokens.weight
    assert inputs.pixels is not None
    pixels = inputs.pixels[tiles].to(weight.device, weight.dtype)
    if isinstance(model, VL):
        low = None if inputs.low_pixels is None else inputs.low_pixels[tiles]
        low = None if low is None else low.to(weight.device, weight.dtype)
        return model.encode_pictures(pixels, low_pixels=low, normalized=inputs.normalized)[0]
    assert inputs.grids is not None
    chunk = tower_tiles(model.config.vision, itemsize=weight.element_size(), free=free_bytes(weight.device))
    return model.encode_pictures(pixels, grids=[inputs.grids[index]], chunk=chunk)


def _wait(tensor: Tensor) -> None:
    """Let a GPU finish, so that the clock tells the truth."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
