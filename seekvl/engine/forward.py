"""The network, fed through the cache: a prompt in pieces, then one token for some slots a step.

Both go through the kernels where they serve the network, a piece or a step in one call (`kernels.prompts`,
`kernels.decoder`), and through torch elsewhere.

Letters: n rows of a step, t tokens of a prompt, s slots of a picture or of several, v vocabulary, d language
width.
"""

from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from seekvl.engine.budget import free_bytes, prefill_tokens, tiles_at_once
from seekvl.engine.cache import KVCache
from seekvl.engine.kernels.decoder import decode, serves
from seekvl.engine.kernels.products import MAX_ROWS
from seekvl.engine.kernels.prompts import append_prompt, prompt_hidden, prompt_logits, prompts_served
from seekvl.engine.pictures import encode_picture
from seekvl.models.vl import VL
from seekvl.models.vl2 import VL2, AnyVL
from seekvl.processing.encode import ModelInput


@torch.inference_mode()
def prefill(
    model: AnyVL, inputs: ModelInput, *, cache: KVCache, row: int, chunk: int | None = None
) -> Tensor:
    """Fill an empty slot of the cache with a prompt; return the logits f32[v] of the token after it.

    Only the last position goes through the head. chunk: most tokens at once; None takes what free memory
    allows.
    """
    *before, last = _pieces(model, embed_prompt(model, inputs), cache=cache, row=row, chunk=chunk)
    for part in before:
        append(model, part, cache=cache, slot=row)
    return follow(model, last, cache=cache, slot=row)


def prefill_hidden(
    model: AnyVL, embeds: Tensor, *, cache: KVCache, row: int, chunk: int | None = None
) -> Iterator[Tensor]:
    """Feed embeddings f[1, t, d] to a slot of the cache, piece by piece; yield each piece's hidden states.

    The cache stays where it is; a piece sees what stands before it there.
    """
    for part in _pieces(model, embeds, cache=cache, row=row, chunk=chunk):
        yield feed(model, part, cache=cache, slot=row)


def _pieces(
    model: AnyVL, embeds: Tensor, *, cache: KVCache, row: int, chunk: int | None
) -> tuple[Tensor, ...]:
    """Make room for embeddings f[1, t, d] in a slot; return them in pieces, see `prefill`."""
    total = cache.lengths[row] + embeds.shape[1]
    cache.reserve(total)
    if chunk is None and exact_cuts(model):
        chunk = embeds.shape[1]  # the kernels cut by themselves
    elif chunk is None:
        chunk = prefill_tokens(
            model.config.language,
            total=total,
            itemsize=embeds.element_size(),
            free=free_bytes(embeds.device),
        )
    return torch.split(embeds, chunk, dim=1)


@torch.inference_mode()
def append(model: AnyVL, embeds: Tensor, *, cache: KVCache, slot: int) -> None:
    """Append embeddings f[1, t, d] to what a slot holds."""
    if _plain(model) and append_prompt(model.language, embeds[0], **_place(cache, slot, embeds)):
        cache.row(slot).advance(embeds.shape[1])
        return
    _feed_torch(model, embeds, cache=cache, slot=slot)


@torch.inference_mode()
def follow(model: AnyVL, embeds: Tensor, *, cache: KVCache, slot: int) -> Tensor:
    """Append embeddings f[1, t, d] to what a slot holds; return the logits f32[v] of the token after them."""
    if _plain(model):
        logits = prompt_logits(model.language, embeds[0], **_place(cache, slot, embeds))
        if logits is not None:
            cache.row(slot).advance(embeds.shape[1])
            return logits
    return model.head(_feed_torch(model, embeds, cache=cache, slot=slot)[0, -1]).float()


@torch.inference_mode()
def feed(model: AnyVL, embeds: Tensor, *, cache: KVCache, slot: int) -> Tensor:
    """Append embeddings f[1, t, d] to what a slot holds; return their hidden states f[1, t, d]."""
    if _plain(model):
        hidden = prompt_hidden(model.language, embeds[0], **_place(cache, slot, embeds))
        if hidden is not None:
            cache.row(slot).advance(embeds.shape[1])
            return hidden.to(embeds.dtype).unsqueeze(0)
    return _feed_torch(model, embeds, cache=cache, slot=slot)


class _Place(TypedDict):
    """Where a piece of a prompt goes, as `kernels.prompts` is told."""

    slot: int
    start: int
    keys: list[Tensor]
    values: list[Tensor]


def _place(cache: KVCache, slot: int, embeds: Tensor) -> _Place:
    """Return where embeddings f[1, t, d] go that are appended to a slot, if there is room for them."""
    start = cache.lengths[slot]
    cache.check_room(start + embeds.shape[1])
    keys, values = cache.buffers
    return {"slot": slot, "start": start, "keys": keys, "values": values}


def _feed_torch(model: AnyVL, embeds: Tensor, *, cache: KVCache, slot: int) -> Tensor:
    """Do as `feed` without the kernels' one call."""
    view, tokens = cache.row(slot), embeds.shape[1]
    hidden = model.hidden(embeds, positions=view.positions(tokens), cache=view)
    view.advance(tokens)
    return hidden


def exact_rows(model: AnyVL, cache: KVCache) -> int:
    """Return how many tokens one step may have so that each gets the very numbers it gets alone.

    The kernels promise that for as many as they take at once. torch promises it for one row only: its
    products and its attention sum in an order that depends on how many rows there are and on how long the
    longest is.
    """
    keys, values = cache.buffers
    return MAX_ROWS if _plain(model) and serves(model.language, keys=keys, values=values) else 1


def exact_cuts(model: AnyVL) -> bool:
    """Whether a token of a prompt gets the same numbers wherever the prompt is cut into pieces.

    The kernels promise that, see `kernels.prompts`; torch's sums depend on how many tokens go through at
    once.
    """
    return _plain(model) and prompts_served(model.language)


def _plain(model: AnyVL) -> bool:
    """Whether a model's logits are those of its language model; a subclass may do more."""
    return type(model) in (VL, VL2)


@torch.inference_mode()
def step(model: AnyVL, tokens: Sequence[int], *, cache: KVCache, slots: Sequence[int]) -> Tensor:
    """Feed a token to each of these slots; return the logits f32[n, v] of the next ones.

    A slot that is named several times takes its tokens one behind the other, as a guess does that is to be
    checked; each sees those before it. On the CPU the whole step runs in the kernels where they serve the
    network, see `kernels.decoder`.
    """
    if _plain(model):
        keys, values = cache.buffers
        positions = [cache.lengths[slot] + slots[:row].count(slot) for row, slot in enumerate(slots)]
        logits = decode(model.language, tokens, slots=slots, positions=positions, keys=keys, values=values)
        if logits is not None:
            for slot in slots:
                cache.lengths[slot] += 1
            return logits
    ids = torch.tensor(tokens, device=model.language.embed_tokens.weight.device)  # n
    single = [row for row, slot in enumerate(slots) if slots.count(slot) == 1]
    hidden: dict[int, Tensor] = {}  # row -> d
    if single:
        view = cache.at([slots[row] for row in single])
        out = model.hidden(
            model.embed(ids[single].unsqueeze(1)), positions=view.positions(), mask=view.mask(), cache=view
        )  # n 1 d
        view.advance()
        hidden |= dict(zip(single, out[:, 0], strict=True))
    for slot in sorted({slot for row, slot in enumerate(slots) if row not in hidden}):
        rows = [row for row, named in enumerate(slots) if named == slot]
        out = feed(model, model.embed(ids[rows].unsqueeze(0)), cache=cache, slot=slot)  # 1 n d
        hidden |= dict(zip(rows, out[0], strict=True))
    return model.head(torch.stack([hidden[row] for row in range(len(slots))])).float()


@torch.inference_mode()
def embed_prompt(model: AnyVL, inputs: ModelInput) -> Tensor:
    """Return the embeddings f[1, t, d] of a prompt. Without pictures the towers do not run."""
    features = None
    if inputs.bill.image_tokens:
        chunk = tiles_at_once(model)
        features = torch.cat(
            [
                encode_picture(model, inputs, index=index, chunk=chunk)
                for index in range(len(inputs.bill.image_tokens))
            ]
        )  # s d
    return embed_piece(model, inputs, start=0, end=len(inputs.input_ids), features=features)


@torch.inference_mode()
def embed_piece(model: AnyVL, inputs: ModelInput, *, start: int, end: int, features: Tensor | None) -> Tensor:
    """Return the embeddings f[1, t, d] of tokens start..end of a prompt, given the rows f[s, d] of all slots
    among them.
    """
    device = model.language.embed_tokens.weight.device
    ids = inputs.input_ids[None, start:end].to(device)
    mask = inputs.image_mask[None, start:end].to(device)
    return model.embed(ids, image_mask=mask, image_features=features)
