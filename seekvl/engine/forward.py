"""The network, fed through the cache: a prompt in pieces, then one token for some slots a step.

Letters: n rows of a step, t tokens of a prompt, s slots of a picture or of several, v vocabulary, d language
width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seekvl.engine.budget import free_bytes, prefill_tokens, tiles_at_once
from seekvl.engine.cache import KVCache
from seekvl.engine.kernels.decoder import decode, serves
from seekvl.engine.kernels.products import MAX_ROWS
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
    embeds = embed_prompt(model, inputs)  # 1 t d
    hidden = embeds
    for part in prefill_hidden(model, embeds, cache=cache, row=row, chunk=chunk):
        hidden = part
    return model.head(hidden[0, -1]).float()


def prefill_hidden(
    model: AnyVL, embeds: Tensor, *, cache: KVCache, row: int, chunk: int | None = None
) -> Iterator[Tensor]:
    """Feed embeddings f[1, t, d] to a slot of the cache, piece by piece; yield each piece's hidden states.

    The cache stays where it is; a piece sees what stands before it there.
    """
    total = cache.lengths[row] + embeds.shape[1]
    cache.reserve(total)
    if chunk is None:
        chunk = prefill_tokens(
            model.config.language,
            total=total,
            itemsize=embeds.element_size(),
            free=free_bytes(embeds.device),
        )
    for part in torch.split(embeds, chunk, dim=1):
        yield feed(model, part, cache=cache, slot=row)


@torch.inference_mode()
def feed(model: AnyVL, embeds: Tensor, *, cache: KVCache, slot: int) -> Tensor:
    """Append embeddings f[1, t, d] to what a slot holds; return their hidden states f[1, t, d]."""
    view, tokens = cache.row(slot), embeds.shape[1]
    hidden = model.hidden(embeds, positions=view.positions(tokens), mask=view.mask(tokens), cache=view)
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
