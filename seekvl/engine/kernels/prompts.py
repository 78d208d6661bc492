"""A prompt through a whole language model in one call a piece: from embeddings to the logits of what follows.

The sister of `decoder` for many tokens of one row. Products take them as lanes (`src/many.h`), weights are
read once for all of them, attention goes over the cache by blocks of its columns (`src/attend_many.h`), and
what is between runs in the same threads, where torch would start a dozen small operations a layer.

Numbers are those of `decoder`: float32 from the embeddings to the logits, rounded where they are stored in
the cache, at the inputs of products where a level multiplies pairs of bfloat16, and at those of packed
matrices. Where pairs are multiplied, queries and attention's shares are rounded, too. A latent is expanded
to keys and values of every head, as `models.mla` does with a prompt.

A token's numbers depend on the level and on what it sees: not on the tokens beside it, on where its prompt
is cut into pieces or on the number of threads, bit for bit. That holds down to pieces of a single token,
which go this way as all others do: a step of `decoder` adds in another order, so a token that was decoded
may differ from the same token of a prompt in its last bits.

Letters: n tokens, d width, k key-value heads, e width of a head, v vocabulary.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p

import torch
from torch import Tensor

from seekvl.engine.kernels.accelerate import MOST_ROWS
from seekvl.engine.kernels.compiled import LEVELS, library
from seekvl.engine.kernels.decoder import cache_served, description_of
from seekvl.engine.kernels.network import Description
from seekvl.engine.kernels.products import DTYPES
from seekvl.engine.kernels.structures import Cache, Prompt
from seekvl.models.deepseek_v2 import DeepseekV2
from seekvl.models.llama import Llama
from seekvl.runtime import SeekVLError

PIECE = 640
"""Most tokens of a call: what is between the layers stays within some 50 MB at the width of 1.3B."""

_GAINING = frozenset(LEVELS.index(level) for level in MOST_ROWS)
"""Levels on which many rows are faster than in torch, with every dtype."""


def append_prompt(
    network: Llama | DeepseekV2,
    embeds: Tensor,
    *,
    slot: int,
    start: int,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> bool:
    """Append embeddings f[n, d] to a row of a cache, and compute nothing that the cache does not need.

    Token i goes to column start + i of row `slot` and sees the columns up to there; those in front of `start`
    were filled before. keys, values: the buffers of each layer, f[rows, k, capacity, e] contiguous, which are
    written to.

    False, with nothing written, where the kernels do not serve the network or the moment: see
    `prompts_served`; with a gradient, under autocast, and for a cache or embeddings that are elsewhere or of
    numbers that the kernels do not know.

    Raises SeekVLError for embeddings of another width, a row or columns that do not exist and buffers of
    another network; MemoryError where none is left, with columns from `start` on in any state.
    """
    found = _ready(network, embeds, slot=slot, start=start, keys=keys, values=values)
    if found is None:
        return False
    _fill(found, embeds, slot=slot, start=start, keys=keys, values=values)
    return True


def prompt_logits(
    network: Llama | DeepseekV2,
    embeds: Tensor,
    *,
    slot: int,
    start: int,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor | None:
    """Do as `append_prompt` and return the logits f32[v] of what follows the last token; None for False."""
    found = _ready(network, embeds, slot=slot, start=start, keys=keys, values=values)
    if found is None:
        return None
    logits = torch.empty(found.network.head.rows, dtype=torch.float32, device="cpu")
    _fill(found, embeds, slot=slot, start=start, keys=keys, values=values, logits=logits)
    return logits


def prompt_hidden(
    network: Llama | DeepseekV2,
    embeds: Tensor,
    *,
    slot: int,
    start: int,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor | None:
    """Do as `append_prompt` and return the hidden states f32[n, d] after the last norm; None for False."""
    found = _ready(network, embeds, slot=slot, start=start, keys=keys, values=values)
    if found is None:
        return None
    hidden = torch.empty(embeds.shape, dtype=torch.float32, device="cpu")
    _fill(found, embeds, slot=slot, start=start, keys=keys, values=values, hidden=hidden)
    return hidden


def prompts_served(network: Llama | DeepseekV2) -> bool:
    """Whether prompts of a network go through these calls, gradients, autocast and the cache aside.

    That is so where `network.describe` finds nothing that one call cannot serve, on levels on which many rows
    are faster than in torch: not on `portable`, and not on `neon`, where nothing has been measured.
    """
    return _served(network) is not None


def _served(network: Llama | DeepseekV2) -> Description | None:
    """Return the description of a network that `prompts_served` means."""
    found = description_of(network)
    return found if found is not None and found.level in _GAINING else None


def _ready(
    network: Llama | DeepseekV2,
    embeds: Tensor,
    *,
    slot: int,
    start: int,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Description | None:
    """Return the description of a network whose prompt can be computed now; refuse wrong arguments."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    found = _served(network)
    if found is None or not cache_served(found, keys, values):
        return None
    if not (embeds.is_cpu and embeds.dtype in DTYPES and type(embeds) is Tensor):
        return None
    if embeds.dim() != 2 or embeds.shape[1] != found.network.width or not len(embeds):
        raise SeekVLError(
            f"embeddings {list(embeds.shape)} do not fit [n, {found.network.width}] with at least 1 token"
        )
    rows, capacity = keys[0].shape[0], keys[0].shape[2]
    if not (0 <= slot < rows and start >= 0 and start + len(embeds) <= capacity):
        raise SeekVLError(
            f"row {slot}, columns {start} to {start + len(embeds)} do not exist in a cache of {rows} rows of "
            f"{capacity} tokens"
        )
    return found


def _fill(
    found: Description,
    embeds: Tensor,
    *,
    slot: int,
    start: int,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    hidden: Tensor | None = None,
    logits: Tensor | None = None,
) -> None:
    """Call the library for as many tokens as it shall take at a time; write what is there to be written."""
    in_layers = [(c_void_p * len(side))(*map(Tensor.data_ptr, side)) for side in (keys, values)]
    cache = Cache(DTYPES[keys[0].dtype], keys[0].shape[2], *map(ctypes.addressof, in_layers))
    for begin in range(0, len(embeds), PIECE):
        part = embeds[begin : begin + PIECE].contiguous()
        last = begin + len(part) == len(embeds)
        prompt = Prompt(
            n=len(part),
            slot=slot,
            start=start + begin,
            embeds=part.data_ptr(),
            kind=DTYPES[part.dtype],
            hidden=None if hidden is None else hidden[begin:].data_ptr(),
            logits=logits.data_ptr() if last and logits is not None else None,
        )
        failed = library().prompt(
            found.level,
            torch.get_num_threads(),
            ctypes.addressof(found.network),
            ctypes.addressof(cache),
            ctypes.addressof(prompt),
        )
        if failed:
            raise MemoryError(f"no memory for {len(part)} tokens of a prompt behind {start + begin} others")
