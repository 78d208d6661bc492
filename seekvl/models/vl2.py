"""DeepSeek-VL2: a tower over the tiles of a picture, adaptor, 2-D assembly and a decoder with experts
(2412.10302, sec. 2).

A picture is seen twice: whole, and in a grid of tiles. The features of both stand where words stand, row by
row; each row, of the whole or of the *mosaic* of all tiles, ends in a learned newline:

    whole picture      separator      mosaic of a grid of 2 columns and 1 row
    g g g g N                         a a a a b b b b N
    g g g g N              S          a a a a b b b b N
    g g g g N                         a a a a b b b b N

Letters: b rows, t tokens, n tiles, S side of a tile in px, g features along a side of a tile, d language
width, v vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, overload

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seekvl.models.adaptor import Adaptor, AdaptorConfig
from seekvl.models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from seekvl.models.llama import LayerCache
from seekvl.models.moe import RouterRecord
from seekvl.models.siglip import Siglip, SiglipConfig
from seekvl.models.vl import VL, VLConfig, check_adaptor, splice
from seekvl.runtime import SeekVLError

Grid = tuple[int, int]
"""Columns and rows of the tiles of a picture; (1, 1) for one that is only seen whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VL2Config:
    """The three parts, which must fit each other."""

    vision: SiglipConfig
    adaptor: AdaptorConfig
    language: DeepseekV2Config
    global_first: bool = True
    """Whether the whole picture stands before its tiles; so in all published weights."""

    def __post_init__(self) -> None:
        check_adaptor(self.adaptor, vision=self.vision, width=self.language.width)

    @property
    def image_size(self) -> int:
        """Side of the square tile the network is fed, px."""
        return self.vision.image_size

    @property
    def view_side(self) -> int:
        """Features g along one side of a tile, after the adaptor."""
        return self.adaptor.out_grid(self.vision.grid)

    def slots(self, grid: Grid) -> int:
        """Return the slots a picture of this grid takes among the tokens: whole, separator and mosaic."""
        (columns, rows), g = grid, self.view_side
        return g * (g + 1) + 1 + g * rows * (g * columns + 1)


class VL2(nn.Module):
    """The whole network, single device."""

    def __init__(self, config: VL2Config) -> None:
        super().__init__()
        self.config = config
        self.vision = Siglip(config.vision)
        self.adaptor = Adaptor(config.adaptor)
        self.image_newline = nn.Parameter(torch.zeros(config.language.width))
        self.view_separator = nn.Parameter(torch.zeros(config.language.width))
        self.language = DeepseekV2(config.language)

    def encode_pictures(self, tiles: Tensor, *, grids: Sequence[Grid], chunk: int | None = None) -> Tensor:
        """Turn the tiles f[n, 3, S, S] of pictures into rows f[slots, d] that stand where words stand.

        Each picture is first the whole and then its tiles, row by row; one of grid (1, 1) is the whole alone,
        which is its own only tile. The pixels are normalised. At most `chunk` tiles go through the tower at
        once. Raises SeekVLError when tiles and grids differ in number.
        """
        counts = [_tile_count(grid) for grid in grids]
        if sum(counts) != len(tiles):
            raise SeekVLError(
                f"{len(counts)} grids {list(grids)} stand for {sum(counts)} tiles, {len(tiles)} were given"
            )
        parts = torch.split(tiles, chunk or max(1, len(tiles)))
        features = torch.cat([self.adaptor(self.vision(part, normalized=True)) for part in parts])  # n g*g d
        pictures = zip(torch.split(features, counts), grids, strict=True)
        return torch.cat([self._assemble(picture, grid) for picture, grid in pictures])

    def _assemble(self, features: Tensor, grid: Grid) -> Tensor:
        """Lay out one picture, f[n, g*g, d], as rows f[slots, d]."""
        whole = self._lines(features[:1], (1, 1))
        mosaic = whole if grid == (1, 1) else self._lines(features[1:], grid)
        views = (whole, mosaic) if self.config.global_first else (mosaic, whole)
        return torch.cat((views[0], self.view_separator[None].to(features.dtype), views[1]))

    def _lines(self, features: Tensor, grid: Grid) -> Tensor:
        """Put tiles f[n, g*g, d] side by side and end each line of features in a newline: f[slots, d]."""
        mosaic = rearrange(
            features, "(r c) (y x) d -> (r y) (c x) d", c=grid[0], y=self.config.view_side
        )  # lines features d
        newline = self.image_newline.to(mosaic.dtype).expand(len(mosaic), 1, -1)
        return torch.cat((mosaic, newline), dim=1).flatten(0, 1)

    def embed(
        self, input_ids: Tensor, *, image_mask: Tensor | None = None, image_features: Tensor | None = None
    ) -> Tensor:
        """Return embeddings f[b, t, d] of i64[b, t] with picture rows in their slots, see `vl.splice`."""
        embeds: Tensor = self.language.embed_tokens(input_ids)
        return splice(embeds, image_mask=image_mask, image_features=image_features)

    def hidden(
        self,
        embeds: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        record: RouterRecord | None = None,
    ) -> Tensor:
        """Return hidden states f[b, t, d] after the final norm; arguments as in `DeepseekV2.forward`."""
        out: Tensor = self.language(embeds, positions=positions, mask=mask, cache=cache, record=record)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits f[..., v] of hidden states f[..., d]."""
        out: Tensor = self.language.lm_head(hidden)
        return out

    def forward(
        self,
        input_ids: Tensor,
        *,
        image_mask: Tensor | None = None,
        pixels: Tensor | None = None,
        grids: Sequence[Grid] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the logits f[b, t, v] of every position; without pixels the tower does not run."""
        features = None if pixels is None else self.encode_pictures(pixels, grids=grids or ())
        embeds = self.embed(input_ids, image_mask=image_mask, image_features=features)
        return self.head(self.hidden(embeds, positions=positions, mask=mask))


AnyVL: TypeAlias = VL | VL2
"""A network of either family."""

AnyConfig: TypeAlias = VLConfig | VL2Config


class _OnMeta(TorchFunctionMode):
    """Makes new parameters on the meta device and skips their initialisation, which changes nothing there:
    its first call makes torch import its compiler, which takes a second and 100 MB. One mode does both, for
    torch's own for the device beside it takes a quarter of the time of loading a quantised model.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        if func in _INITIALISERS:
            return args[0] if args else given["tensor"]
        if func in _MAKERS and given.get("device") is None:
            given = {**given, "device": "meta"}
        return func(*args, **given)


_INITIALISERS = frozenset((nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_))
_MAKERS = frozenset((torch.empty, torch.ones, torch.zeros))
"""What networks and layers of torch make parameters with; a test holds all presets to it."""


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Build networks on the meta device: every parameter has a shape and a dtype, none has numbers."""
    with _OnMeta():
        yield


@overload
def on_meta(config: VLConfig) -> VL: ...
@overload
def on_meta(config: VL2Config) -> VL2: ...
def on_meta(config: AnyConfig) -> AnyVL:
    """Build the network without memory: every parameter has a shape and a dtype, none has numbers yet."""
    with without_memory():
        return VL(config) if isinstance(config, VLConfig) else VL2(config)


def _tile_count(grid: Grid) -> int:
    """Tiles fed for a picture: the whole, and those of its grid unless the whole is the only one."""
    columns, rows = grid
    return 1 if grid == (1, 1) else 1 + columns * rows
