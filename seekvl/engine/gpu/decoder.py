"""A step of decoding that can be recorded: on memory that never moves, with every length on the device.

A step of few rows is hundreds of small kernels, and a host that starts them one by one is slower than the
GPU. So a step is recorded once for each *bucket* of rows and replayed:

    5 answers -> bucket of 8:   token    7  3  9  1  4  7  7  7
                                slot     0  2  3  5  9  0  0  0     rows beyond the answers repeat the first:
                                column  12 80 41  7  3 12 12 12     they write what it writes, where it does

Repeated rows touch no slot but one that is fed anyway, and ask no further experts. A recording holds the
addresses of weights and cache; it is made again where these are exchanged.

Letters: n rows of a step, d width, h heads, k key-value heads, e width of a head, w width of a value, r of a
latent, v vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from seekvl.engine.cache import KVCache
from seekvl.engine.gpu.kernels import attend_rows
from seekvl.engine.gpu.layers import MOST_ROWS, GpuExperts
from seekvl.engine.gpu.switch import RECORDED, Compiled, choose_gpu_level
from seekvl.engine.kernels.accelerate import KERNELS
from seekvl.models import deepseek_v2, llama
from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.llama import Attention, Mlp, RmsNorm, rotary_table
from seekvl.models.mla import Mla
from seekvl.models.moe import Gate, Moe
from seekvl.models.vl import VL
from seekvl.models.vl2 import VL2, AnyVL
from seekvl.runtime import SeekVLError

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

BUCKETS = (1, 2, 4, 8, 16, 32, MOST_ROWS)
"""Rows that a step is recorded for; more go in groups of the largest."""

LEAST_CAPACITY = 1024
"""Columns that the cache has at least: every exchange of its buffers costs new recordings."""

WARM_UPS = 2
"""Steps before a recording: kernels are chosen, compiled and given their memory in them."""

PARTS = frozenset(
    (
        *(llama.Llama, llama.Layer, deepseek_v2.DeepseekV2, deepseek_v2.Layer, nn.ModuleList),
        *(Attention, Mla, Mlp, Moe, Gate, GpuExperts, RmsNorm, nn.Embedding),
        *(*KERNELS, *KERNELS.values()),  # linear layers and experts, for the CPU too
    )
)
"""What a network may be made of; a subclass of these is somebody else's, and computes as he wants."""

Layer = llama.Layer | deepseek_v2.Layer
Table = tuple[Tensor, Tensor]
Queries = tuple[Tensor, Tensor | None]
Stored = tuple[Tensor, Tensor]


def static_decoder(model: AnyVL, level: str | None = None) -> "StaticDecoder | None":
    """Return what decodes for a network on the level of its device (`gpu.switch`); None where torch walks
    through the layers: there, and where a part is of another class, or has a hook.
    """
    chosen = choose_gpu_level(model.language.embed_tokens.weight.device, level)
    if chosen is None or not _plain(model):
        return None
    return StaticDecoder(model, level=chosen)


def _plain(model: AnyVL) -> bool:
    """Whether a network, and all that is in its language model, computes as its class says."""
    return type(model) in (VL, VL2) and all(
        type(part) in PARTS
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)
        for part in model.language.modules()
    )


def bucket_of(rows: int) -> int:
    """Return the bucket of so many rows; beyond the largest the next multiple of it.

    >>> [bucket_of(rows) for rows in (1, 3, 64, 65)]
    [1, 4, 64, 128]
    """
    largest = BUCKETS[-1]
    return next((size for size in BUCKETS if size >= rows), -(-rows // largest) * largest)


def roomy(rows: int, capacity: int, *, longest: int, tokens: int | None) -> tuple[int, int]:
    """Return the rows and columns a cache gets when so many are needed: rounded up, so that buffers are
    seldom exchanged, where that stays within so many tokens.

    >>> roomy(3, 300, longest=4096, tokens=None), roomy(3, 1300, longest=4096, tokens=4096)
    ((4, 1024), (3, 1300))
    """
    wide = bucket_of(rows), min(longest, max(LEAST_CAPACITY, 1 << (capacity - 1).bit_length()))
    return wide if tokens is None or wide[0] * wide[1] <= tokens else (rows, capacity)


class StaticDecoder:
    """Makes steps of one token for some slots of a cache; recorded ones, where its level has graphs."""

    def __init__(self, model: AnyVL, *, level: str) -> None:
        self.model, self.level = model, level
        self._records = level in RECORDED and model.language.embed_tokens.weight.is_cuda
        self._recordings: dict[int, Recording] = {}
        self._addresses: tuple[int, ...] = ()
        self._pool: _POOL_HANDLE | None = None
        """Memory that all recordings share: no two run at once, and none leaves anything to another."""
        compiled = level == "compiled"
        self._before: Callable[[Layer, Tensor, Table], tuple[Queries, Stored]]
        self._after: Callable[[Layer, Tensor, Tensor], Tensor]
        self._before = Compiled(before_cache) if compiled else before_cache
        self._after = Compiled(after_cache) if compiled else after_cache
        self._attend: Callable[..., Tensor] = attend_rows
        if self._records:
            from seekvl.engine.gpu import triton_kernels

            self._attend = triton_kernels.attend_rows

    def forget(self) -> None:
        """Give up all recordings, and with them what they hold of a former cache."""
        self._recordings.clear()
        self._pool = None  # it ends with the last recording

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], *, cache: KVCache, slots: Sequence[int]) -> Tensor:
        """Feed a token to each of these slots, none twice; return the logits f32[n, v] of the next ones."""
        if not len(tokens) == len(slots) == len(set(slots)) > 0:
            raise SeekVLError(f"a step takes one token for each of some slots, not {list(slots)}")
        columns = [cache.lengths[slot] for slot in slots]
        cache.check_room(max(columns) + 1)
        fed = list(zip(tokens, slots, columns, strict=True))
        size = BUCKETS[-1]
        logits = [self._group(fed[start : start + size], cache) for start in range(0, len(fed), size)]
        for slot in slots:
            cache.lengths[slot] += 1
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _group(self, fed: list[tuple[int, int, int]], cache: KVCache) -> Tensor:
        """Do the step of a group that fits into a bucket."""
        bucket = bucket_of(len(fed))
        padded = torch.tensor(fed + fed[:1] * (bucket - len(fed))).T.contiguous()  # 3 n
        if not self._records:
            return self._run(padded.to(cache.device), cache)[: len(fed)]
        addresses = tuple(map(Tensor.data_ptr, chain(*cache.buffers)))
        if addresses != self._addresses:
            self.forget()
            self._addresses = addresses
        recording = self._recordings.get(bucket)
        if recording is None:
            recording = self._recordings[bucket] = self._record(padded.to(cache.device), cache)
        recording.fed.copy_(padded, non_blocking=True)  # so few that the call takes them along
        recording.graph.replay()
        return recording.logits[: len(fed)].clone()  # the next step writes there

    def _record(self, fed: Tensor, cache: KVCache) -> "Recording":
        """Record a step of a bucket; the cache is left as after this step, however often it was made."""
        current = torch.cuda.current_stream(fed.device)
        stream = torch.cuda.Stream(fed.device)  # type: ignore[no-untyped-call]  # torch has no types here
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run(fed, cache)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=stream,
            capture_error_mode="thread_local",  # other threads may use the device meanwhile
        ):
            logits = self._run(fed, cache)
        self._pool = graph.pool()
        held = [tensor.detach() for tensor in chain(self.model.language.parameters(), *cache.buffers)]
        return Recording(graph, fed, logits, held)

    def _run(self, fed: Tensor, cache: KVCache) -> Tensor:
        """Return the logits f32[n, v] of fed i64[3, n]: tokens, slots and columns."""
        network, (tokens, slots, columns) = self.model.language, fed.unbind()
        config, (keys, values) = network.config, cache.buffers
        width = config.rope_width if isinstance(config, DeepseekV2Config) else config.head_width
        table = rotary_table(columns[:, None], width=width, theta=config.rope_theta)
        x = network.embed_tokens(tokens).unsqueeze(1)  # n 1 d
        for index, layer in enumerate(network.layers):
            assert isinstance(layer, Layer)
            (q, latent_q), stored = self._before(layer, x, table)
            for buffer, new in zip((keys[index], values[index]), stored, strict=True):
                buffer[slots, :, columns] = new  # n k e
            mixed = self._attend(
                q,
                keys[index],
                values[index],
                slots=slots,
                columns=columns,
                scale=_scale(layer.attn),
                latent_q=latent_q,
            )  # n h w, of a latent n h r
            x = self._after(layer, x, mixed)
        return self.model.head(network.norm(x)[:, 0]).float()


@dataclass(frozen=True, slots=True)
class Recording:
    """A step of one bucket, as a graph over memory of its own."""

    graph: torch.cuda.CUDAGraph
    fed: Tensor
    """i64[3, n], what it reads: tokens, slots and columns."""
    logits: Tensor
    """f32[n, v], what it writes."""
    held: list[Tensor]
    """Everything whose addresses it knows: none is given back while it may be replayed."""


def _scale(attn: Attention | Mla) -> float:
    """Return what scores are multiplied by."""
    if isinstance(attn, Mla):
        return attn.scale
    return 1 / math.sqrt(attn.q_proj.out_features // attn.heads)


def before_cache(layer: Layer, x: Tensor, table: Table) -> tuple[Queries, Stored]:
    """Return the queries f[n, h, e] of x[n, 1, d], with a latent also those f[n, h, r] that meet it, and what
    goes into the cache: f[n, k, e] in the place of keys, f[n, k, w] in that of values.
    """
    attn, y = layer.attn, layer.attn_norm(x)
    if isinstance(attn, Mla):
        q, q_rope, k_rope, latent = attn.project(y, table=table)
        latent_q = torch.einsum("nhe,her->nhr", q[:, :, 0], attn.halves()[0])
        return (q_rope[:, :, 0], latent_q), (k_rope[:, :, 0], latent[:, :, 0])
    q, k, v = attn.project(y, table=table)
    return (q[:, :, 0], None), (k[:, :, 0], v[:, :, 0])


def after_cache(layer: Layer, x: Tensor, mixed: Tensor) -> Tensor:
    """Return the stream f[n, 1, d] after a layer, given x before it and what attention made, f[n, h, w] or,
    of a latent, f[n, h, r].
    """
    if isinstance(layer.attn, Mla):
        mixed = torch.einsum("nhr,hwr->nhw", mixed, layer.attn.halves()[1])
    x = x + layer.attn.o_proj(mixed.flatten(1).unsqueeze(1))
    out: Tensor = x + layer.mlp(layer.mlp_norm(x))
    return out
