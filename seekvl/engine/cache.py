"""Keys and values of the tokens seen so far, in buffers made ahead.

    slot 0   a a a a a . . .      length 5
    slot 1   . . . . . . . .      free
    slot 2   b b . . . . . .      length 2: a new token of slot 2 goes to column 2
             `- capacity 8 -'

A slot belongs to one answer while it grows and is never moved; the slots in use need not be the first ones.
Every slot is appended at its own length, so prompts of different lengths need no padding tokens. What a
network with latent attention keeps of a token stands in the same two places: the rotated key that all heads
share where the keys are, the latent where the values are.

Letters: n rows of a step, t new tokens, s visible tokens, k key-value heads, e width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.llama import LlamaConfig
from seekvl.runtime import SeekVLError

BLOCK = 256
"""Buffers grow by whole blocks of this many tokens, and by at least a quarter of what they are."""


def grown(tokens: int, *, capacity: int, limit: int) -> int:
    """Return the capacity that buffers of this capacity get when a slot needs so many tokens.

    >>> grown(300, capacity=256, limit=4096), grown(2049, capacity=2048, limit=2100)
    (512, 2100)
    """
    if tokens <= capacity:
        return capacity
    wanted = max(tokens, capacity + capacity // 4)
    return min(-(-wanted // BLOCK) * BLOCK, limit)


def token_bytes(config: LlamaConfig | DeepseekV2Config, *, itemsize: int) -> int:
    """Return the bytes that all layers keep of one token; itemsize: bytes of a number."""
    return config.layers * itemsize * sum(heads * width for heads, width in config.cache_shape)


class KVCache:
    """Slots of one capacity, each with a length of its own.

    `row` is the view through which one slot takes a prompt, `at` that through which some slots take a token
    each. Lengths move only with `advance` of a view, after a forward that went through: an interrupted one
    leaves no trace.
    """

    def __init__(
        self,
        config: LlamaConfig | DeepseekV2Config,
        *,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if rows < 1:
            raise SeekVLError(f"a cache needs at least 1 row, not {rows}")
        self.limit = config.max_positions
        self.lengths = [0] * rows
        self.capacity = 0
        (key_heads, key_width), (value_heads, value_width) = config.cache_shape
        shapes = (rows, key_heads, 0, key_width), (rows, value_heads, 0, value_width)
        with torch.inference_mode(mode=False):  # ordinary tensors, which may be written to in any mode
            self._keys, self._values = (
                [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]
                for shape in shapes
            )

    @property
    def rows(self) -> int:
        """How many slots there are."""
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self._keys[0].device

    @property
    def nbytes(self) -> int:
        """Bytes the buffers take."""
        return sum(buffer.nbytes for buffer in (*self._keys, *self._values))

    @property
    def buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """What each layer holds: f[rows, k, capacity, e], contiguous, of the keys and of the values, or of
        what stands in their place. `reserve` and `resize` exchange them.
        """
        return self._keys, self._values

    def reserve(self, tokens: int) -> None:
        """Make room for rows of this many tokens. Raises SeekVLError beyond the model's longest sequence."""
        if tokens > self.limit:
            raise SeekVLError(
                f"{tokens:,} tokens exceed the model's longest sequence of {self.limit:,}; shorten the prompt"
            )
        self.resize(rows=self.rows, capacity=grown(tokens, capacity=self.capacity, limit=self.limit))

    def resize(self, *, rows: int, capacity: int) -> None:
        """Make it so many slots of so many tokens; what lies beyond is forgotten, all else is kept."""
        if rows < 1 or not 0 <= capacity <= self.limit:
            raise SeekVLError(f"a cache of {rows} rows and {capacity} tokens each cannot be")
        if (rows, capacity) == (self.rows, self.capacity):
            return
        lengths = [min(length, capacity) for length in self.lengths[:rows]]
        kept, used = len(lengths), max(lengths)
        for buffers in (self._keys, self._values):
            for layer, old in enumerate(buffers):
                with torch.inference_mode(mode=False):  # zeros: attention multiplies what a mask hides by 0
                    fresh = old.new_zeros((rows, old.shape[1], capacity, old.shape[3]))
                fresh[:kept, :, :used] = old[:kept, :, :used]
                buffers[layer] = fresh
        self.lengths = lengths + [0] * (rows - kept)
        self.capacity = capacity

    def row(self, index: int) -> "RowCache":
        """Return the view through which one slot takes a prompt."""
        return RowCache(self, index)

    def at(self, slots: Sequence[int]) -> "SlotCache":
        """Return the view through which these slots take one token each."""
        return SlotCache(self, slots)

    def truncate(self, row: int, length: int) -> None:
        """Forget what a slot holds from column `length` on."""
        if not 0 <= length <= self.lengths[row]:
            raise SeekVLError(f"row {row} holds {self.lengths[row]} tokens and cannot be cut to {length}")
        self.lengths[row] = length

    def copy(self, source: int, target: int, *, length: int) -> None:
        """Let slot `target` hold the first tokens of slot `source`, and nothing else."""
        if not 0 <= length <= self.lengths[source]:
            raise SeekVLError(f"row {source} holds {self.lengths[source]} tokens, {length} cannot be copied")
        if source != target:
            for buffer in (*self._keys, *self._values):
                buffer[target, :, :length] = buffer[source, :, :length]
        self.lengths[target] = length

    def wipe(self, row: int) -> None:
        """Empty a slot and overwrite it: numbers that are not finite would reach who comes after through a
        mask.
        """
        for buffer in (*self._keys, *self._values):
            buffer[row].zero_()
        self.lengths[row] = 0

    def _append(self, layer: int, k: Tensor, v: Tensor, *, row: int) -> tuple[Tensor, Tensor]:
        """Store f[1, k, t, e] in one slot; return f[1, k, s, e] of all it holds."""
        start, end = self.lengths[row], self.lengths[row] + k.shape[2]
        self.check_room(end)
        keys, values = self._keys[layer][row : row + 1], self._values[layer][row : row + 1]  # 1 k capacity e
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def check_room(self, end: int) -> None:
        """Refuse to write past the buffers, which slices would do without a word."""
        if end > self.capacity:
            raise SeekVLError(
                f"the cache has room for {self.capacity} tokens a row, {end} are needed; reserve() them"
            )


class RowCache:
    """One slot of a `KVCache`, as the `LayerCache` of a prompt."""

    def __init__(self, cache: KVCache, index: int) -> None:
        self._cache, self._index = cache, index

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens f[1, k, t, e] of the slot; return f[1, k, s, e] of all it holds."""
        return self._cache._append(layer, k, v, row=self._index)

    def positions(self, tokens: int) -> Tensor:
        """Return the positions i64[1, t] of the next t tokens."""
        start = self._cache.lengths[self._index]
        return torch.arange(start, start + tokens, device=self._cache.device).unsqueeze(0)

    def advance(self, tokens: int) -> None:
        """Count the tokens just stored."""
        self._cache.lengths[self._index] += tokens


class SlotCache:
    """Some slots of a `KVCache`, as the `LayerCache` of one new token each."""

    def __init__(self, cache: KVCache, slots: Sequence[int]) -> None:
        if not slots or len(set(slots)) != len(slots):
            raise SeekVLError(f"a step takes one token for each of some slots, not {list(slots)}")
        self._cache, self._slots = cache, list(slots)
        self._lengths = [cache.lengths[slot] for slot in slots]
        self._index = torch.tensor(self._slots, device=cache.device)
        self._columns = torch.tensor(self._lengths, device=cache.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new token f[n, k, 1, e] of each slot; return f[n, k, s, e] up to the longest.

        Where slots differ in length, `mask` tells what is theirs. Neighbours are read where they lie; slots
        with gaps between them are copied.
        """
        if k.shape[2] != 1:
            raise SeekVLError(f"{k.shape[2]} tokens a slot for a view that takes 1; use row() for a prompt")
        end = max(self._lengths) + 1
        self._cache.check_room(end)
        keys, values = (side[layer] for side in self._cache.buffers)
        keys[self._index, :, self._columns] = k[:, :, 0]
        values[self._index, :, self._columns] = v[:, :, 0]
        first, n = self._slots[0], len(self._slots)
        if self._slots == list(range(first, first + n)):
            return keys[first : first + n, :, :end], values[first : first + n, :, :end]
        return keys[:, :, :end][self._index], values[:, :, :end][self._index]

    def positions(self) -> Tensor:
        """Return the position i64[n, 1] of each slot's next token."""
        return self._columns.unsqueeze(1)

    def mask(self) -> Tensor | None:
        """Return what each slot's next token may see, bool[n, 1, 1, s]; None for slots of one length."""
        if min(self._lengths) == max(self._lengths):
            return None
        columns = torch.arange(max(self._lengths) + 1, device=self._cache.device)
        return (columns <= self.positions())[:, None, None, :]

    def advance(self) -> None:
        """Count the tokens just stored."""
        for slot in self._slots:
            self._cache.lengths[slot] += 1
