"""Keys and values of the tokens seen so far, in buffers made ahead.

    row 0   a a a a a . . .      length 5
    row 1   b b . . . . . .      length 2: a new token of row 1 goes to column 2
            `- capacity 8 -'

Every row is appended at its own length, so prompts of different lengths need no padding tokens. What a
network with latent attention keeps of a token stands in the same two places: the rotated key that all heads
share where the keys are, the latent where the values are.

Letters: b rows, n rows in use, t new tokens, s visible tokens, k key-value heads, e width of a head.
"""

import torch
from torch import Tensor

from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.llama import LlamaConfig
from seekvl.runtime import SeekVLError

BLOCK = 256
"""Buffers grow by whole blocks of this many tokens, and by at least a quarter of what they are."""


class KVCache:
    """The cache of a batch. As a `LayerCache` it takes one new token for each of its first n rows; `row`
    takes many for one row. Lengths move only with `advance`, after a forward that went through: an
    interrupted one leaves no trace.
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
    def nbytes(self) -> int:
        """Bytes the buffers take."""
        return sum(buffer.nbytes for buffer in (*self._keys, *self._values))

    @property
    def buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """What each layer holds: f[rows, k, capacity, e] of the keys and of the values, or of what stands in
        their place. `reserve` may exchange them.
        """
        return self._keys, self._values

    def reserve(self, tokens: int) -> None:
        """Make room for rows of this many tokens. Raises SeekVLError beyond the model's longest sequence."""
        if tokens > self.limit:
            raise SeekVLError(
                f"{tokens:,} tokens exceed the model's longest sequence of {self.limit:,}; shorten the prompt"
            )
        if tokens <= self.capacity:
            return
        wanted = max(tokens, self.capacity + self.capacity // 4)
        capacity = min(-(-wanted // BLOCK) * BLOCK, self.limit)
        used = max(self.lengths)
        for buffers in (self._keys, self._values):
            for layer, old in enumerate(buffers):
                with torch.inference_mode(mode=False):  # zeros: attention multiplies what a mask hides by 0
                    fresh = old.new_zeros((old.shape[0], old.shape[1], capacity, old.shape[3]))
                fresh[:, :, :used] = old[:, :, :used]
                buffers[layer] = fresh
        self.capacity = capacity

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one new token f[n, k, 1, e] of each of the first n rows; return f[n, k, s, e] up to the
        longest row.

        Where rows differ in length, `mask` tells what is theirs.
        """
        n, tokens = k.shape[0], k.shape[2]
        if tokens != 1:
            raise SeekVLError(f"{tokens} tokens a row for a cache that takes 1; use row() for a prompt")
        lengths = self.lengths[:n]
        end = max(lengths) + 1
        self._check_room(end)
        keys, values = self._keys[layer][:n], self._values[layer][:n]  # n k capacity e
        if min(lengths) == end - 1:
            keys[:, :, end - 1 : end] = k
            values[:, :, end - 1 : end] = v
        else:
            rows = torch.arange(n, device=k.device)
            columns = torch.tensor(lengths, device=k.device)
            keys[rows, :, columns] = k[:, :, 0]
            values[rows, :, columns] = v[:, :, 0]
        return keys[:, :, :end], values[:, :, :end]

    def positions(self, n: int) -> Tensor:
        """Return the position i64[n, 1] of the next token of each of the first n rows."""
        return torch.tensor(self.lengths[:n], device=self._keys[0].device).unsqueeze(1)

    def mask(self, n: int) -> Tensor | None:
        """Return what the next token of each row may see, bool[n, 1, 1, s]; None for rows of one length."""
        lengths = self.lengths[:n]
        if min(lengths) == max(lengths):
            return None
        columns = torch.arange(max(lengths) + 1, device=self._keys[0].device)
        return (columns <= self.positions(n))[:, None, None, :]

    def advance(self, n: int) -> None:
        """Count the token just stored in each of the first n rows."""
        for row in range(n):
            self.lengths[row] += 1

    def row(self, index: int) -> "RowCache":
        """Return the view through which one row takes a prompt."""
        return RowCache(self, index)

    def truncate(self, row: int, length: int) -> None:
        """Forget what a row holds from column `length` on."""
        if not 0 <= length <= self.lengths[row]:
            raise SeekVLError(f"row {row} holds {self.lengths[row]} tokens and cannot be cut to {length}")
        self.lengths[row] = length

    def move(self, source: int, target: int) -> None:
        """Put row `source` in the place of row `target`, whose answer is finished."""
        if source == target:
            return
        used = self.lengths[source]
        for buffer in (*self._keys, *self._values):
            buffer[target, :, :used] = buffer[source, :, :used]
        self.lengths[target] = used

    def _append(self, layer: int, k: Tensor, v: Tensor, *, row: int) -> tuple[Tensor, Tensor]:
        """Store f[1, k, t, e] in one row; return f[1, k, s, e] of all it holds."""
        start, end = self.lengths[row], self.lengths[row] + k.shape[2]
        self._check_room(end)
        keys, values = self._keys[layer][row : row + 1], self._values[layer][row : row + 1]  # 1 k capacity e
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def _check_room(self, end: int) -> None:
        """Refuse to write past the buffers, which slices would do without a word."""
        if end > self.capacity:
            raise SeekVLError(
                f"the cache has room for {self.capacity} tokens a row, {end} are needed; reserve() them"
            )


class RowCache:
    """One row of a `KVCache`, as the `LayerCache` of a prompt."""

    def __init__(self, cache: KVCache, index: int) -> None:
        self._cache, self._index = cache, index

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens f[1, k, t, e] of the row; return f[1, k, s, e] of all it holds."""
        return self._cache._append(layer, k, v, row=self._index)

    def mask(self, tokens: int) -> Tensor | None:
        """Return what t new tokens may see, bool[1, 1, t, s]; None in an empty row, where plain causal fits.

        2 tokens in the row, 3 new ones     x x x . .
                                            x x x x .
                                            x x x x x
        """
        start = self._cache.lengths[self._index]
        if start == 0 or tokens == 1:
            return None
        device = self._cache._keys[0].device
        return torch.ones(tokens, start + tokens, dtype=torch.bool, device=device).tril(start)[None, None]

    def advance(self, tokens: int) -> None:
        """Count the tokens just stored."""
        self._cache.lengths[self._index] += tokens
