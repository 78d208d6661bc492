"""One decoding step of a whole language model in one call: from tokens to logits without torch.

Between two products of a step torch would start a dozen small operations, each with threads of its own that
then spin on the cores of the next product. Here norms, rotary positions, attention over the cache, router and
products follow each other in the kernels' own threads.

Numbers stay in float32 from the embedding to the logits. They are rounded where they are stored, in the
cache; where a level multiplies pairs of bfloat16, at the input of such products; and at the input of packed
matrices, as `models.quantized` says. torch rounds after every operation. A token's logits depend on the level
and on what the token sees: not on the tokens beside it, nor on the number of threads, bit for bit.

Letters: n tokens, k key-value heads, e width of a head, v vocabulary.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from seekvl.engine.kernels.compiled import library
from seekvl.engine.kernels.network import Description, describe
from seekvl.engine.kernels.products import DTYPES, MAX_ROWS
from seekvl.engine.kernels.structures import Cache, Tokens
from seekvl.models.deepseek_v2 import DeepseekV2
from seekvl.models.llama import Llama
from seekvl.runtime import SeekVLError

_KNOWN: WeakKeyDictionary[nn.Module, Description] = WeakKeyDictionary()
"""Descriptions of networks that still exist."""


def decode(
    network: Llama | DeepseekV2,
    tokens: Sequence[int],
    *,
    slots: Sequence[int],
    positions: Sequence[int],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor | None:
    """Feed tokens to rows of a cache; return the logits f32[n, v] of what follows each, or None.

    Token i goes to column positions[i] of row slots[i], and sees the columns up to there. Several tokens of
    one row may stand at following positions: they are appended together, each sees those before it, and they
    give what they would have given one by one. Columns that stand nowhere in `positions` were filled before.

    keys, values: the buffers of each layer, f[rows, k, capacity, e] contiguous, which are written to.

    None, with nothing written, where the kernels do not serve the network or the moment: see `describe`; with
    a gradient, under autocast, and for a cache that is elsewhere or of numbers that the kernels do not know.
    More than `MAX_ROWS` tokens are computed in groups, as one group after the other.

    Raises SeekVLError for a token, row or column that does not exist, for tokens of a row out of order, and
    for buffers of another network.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    found = description_of(network)
    if found is None or not cache_served(found, keys, values):
        return None
    _check(found, tokens, slots=slots, positions=positions, buffer=keys[0])
    logits = torch.empty(len(tokens), found.network.head.rows, dtype=torch.float32, device="cpu")
    in_layers = [(c_void_p * len(side))(*map(Tensor.data_ptr, side)) for side in (keys, values)]
    cache = Cache(DTYPES[keys[0].dtype], keys[0].shape[2], *map(ctypes.addressof, in_layers))
    for start in range(0, len(tokens), MAX_ROWS):
        group = slice(start, start + MAX_ROWS)
        _step(found, cache, tokens[group], slots[group], positions[group], logits=logits[group])
    return logits


def serves(network: Llama | DeepseekV2, *, keys: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    """Whether `decode` computes a step of this network and this cache, gradients and autocast aside.

    Raises SeekVLError for buffers of another network.
    """
    found = description_of(network)
    return found is not None and cache_served(found, keys, values)


def _step(
    found: Description,
    cache: Cache,
    tokens: Sequence[int],
    slots: Sequence[int],
    positions: Sequence[int],
    *,
    logits: Tensor,
) -> None:
    """Call the library for as many tokens as it takes; write logits f32[n, v]."""
    numbers = [(c_int64 * len(tokens))(*column) for column in (tokens, slots, positions)]
    new = Tokens(len(tokens), *map(ctypes.addressof, numbers))
    library().step(
        found.level,
        torch.get_num_threads(),
        ctypes.addressof(found.network),
        ctypes.addressof(cache),
        ctypes.addressof(new),
        logits.data_ptr(),
    )


def description_of(network: Llama | DeepseekV2) -> Description | None:
    """Return the description of a network, made once and again when the network has changed."""
    known = _KNOWN.get(network)
    if known is not None and known.stands():
        return known
    made = describe(network)
    if made is None:
        _KNOWN.pop(network, None)
    else:
        _KNOWN[network] = made
    return made


def cache_served(found: Description, keys: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    """Whether the buffers are plain memory of one kind.

    Raises SeekVLError where they are another network's.
    """
    layers = found.network.layer_count
    if not len(keys) == len(values) == layers:
        raise SeekVLError(f"a cache of {len(keys)} and {len(values)} layers for a network of {layers}")
    for side, (heads, width) in zip((keys, values), found.cache_shapes, strict=True):
        shape = (keys[0].shape[0], heads, keys[0].shape[2], width)
        for buffer in side:
            if buffer.shape != shape:
                raise SeekVLError(
                    f"a buffer of the cache is {list(buffer.shape)}; the network needs {list(shape)}"
                )
            if not (buffer.is_cpu and buffer.is_contiguous() and buffer.dtype is keys[0].dtype):
                return False
    return keys[0].dtype in DTYPES


def _check(
    found: Description,
    tokens: Sequence[int],
    *,
    slots: Sequence[int],
    positions: Sequence[int],
    buffer: Tensor,
) -> None:
    """Refuse what would read or write elsewhere, or in the wrong order."""
    if not len(tokens) == len(slots) == len(positions) > 0:
        raise SeekVLError(
            f"{len(tokens)} tokens, {len(slots)} rows and {len(positions)} columns; a step needs as many of "
            "each, and at least 1"
        )
    rows, capacity = buffer.shape[0], buffer.shape[2]
    last: dict[int, int] = {}
    for token, slot, position in zip(tokens, slots, positions, strict=True):
        if not 0 <= token < found.vocab:
            raise SeekVLError(f"token {token} is none of the {found.vocab:,} of the embedding")
        if not (0 <= slot < rows and 0 <= position < capacity):
            raise SeekVLError(
                f"row {slot}, column {position} does not exist in a cache of {rows} rows of {capacity} tokens"
            )
        if position <= last.get(slot, -1):
            raise SeekVLError(
                f"row {slot}: a token for column {position} after one for column {last[slot]}; tokens of a "
                "row come in their order"
            )
        last[slot] = position
