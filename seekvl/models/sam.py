"""SAM-B as a feature tower: the high-resolution half of DeepSeek-VL-7B's hybrid encoder (2403.05525, sec.
3.1).

A ViTDet with windows and decomposed relative positions, a convolutional neck, and the downsampling that
brings its 64 x 64 map to the 24 x 24 grid of the other tower. The published weights also have a side branch
that the paper does not mention: the output of the first global block passes a neck of its own and is added,
scaled by a learned alpha.

Letters: n pictures, g patches along a side (where attention alone is meant: heads of all squares), c width,
h heads, e width of a head, w side of a square, s keys along a side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seekvl.models.attention import attend_in_blocks
from seekvl.models.siglip import Mlp, Rgb, embed_patches, normalise
from seekvl.runtime import SeekVLError, check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class SamConfig:
    """Dimensions of the tower; defaults are the published sam_b_downsample."""

    image_size: int = 1024
    """Side of the square picture, px."""
    patch_size: int = 16
    """Side of a patch, px."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    window: int = 14
    """Side of an attention window, patches."""
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks that attend over the whole map; the first also feeds the side branch."""
    neck_channels: int = 256
    downsample_channels: tuple[int, int] = (512, 1024)
    """Channels after the two stride-2 convolutions; the last is the width handed to the adaptor."""
    resize_side: int = 96
    """Side of the map after interpolation; the grid handed on is a quarter of it (2403.05525, sec. 3.1)."""
    norm_eps: float = 1e-6
    pixel_mean: Rgb | None = None
    """Per-channel mean subtracted inside the tower; None where the processor normalises."""
    pixel_std: Rgb | None = None

    def __post_init__(self) -> None:
        check_positive("SAM", self)
        if min(self.downsample_channels) < 1:
            raise SeekVLError(f"SAM downsample_channels {self.downsample_channels} must be at least 1")
        if self.width % self.heads:
            raise SeekVLError(f"SAM width {self.width} is not divisible by its {self.heads} heads")
        if self.image_size % self.patch_size:
            raise SeekVLError(
                f"SAM image_size {self.image_size} is not a multiple of its patch of {self.patch_size} px"
            )
        if not self.global_layers or not all(0 <= layer < self.layers for layer in self.global_layers):
            raise SeekVLError(
                f"SAM global_layers {self.global_layers} must name blocks of 0..{self.layers - 1}"
            )
        if self.resize_side % 4:
            raise SeekVLError(f"SAM resize_side {self.resize_side} is not a multiple of 4")
        if (self.pixel_mean is None) != (self.pixel_std is None):
            raise SeekVLError("SAM needs both pixel_mean and pixel_std, or neither")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def out_grid(self) -> int:
        """Features along one side after the two stride-2 convolutions."""
        return self.resize_side // 4


class PixelNorm(nn.Module):
    """Layer norm over the channels of a map n c y x, with biased variance, in the dtype of the map."""

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every pixel of x[n, c, y, x] over its channels."""
        mean = x.mean(1, keepdim=True)
        x = x - mean
        x = x / torch.sqrt(x.square().mean(1, keepdim=True) + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Neck(nn.Module):
    """1x1 and 3x3 convolutions without bias, each followed by a norm."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        channels = config.neck_channels
        self.conv1 = nn.Conv2d(config.width, channels, 1, bias=False)
        self.norm1 = PixelNorm(channels, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = PixelNorm(channels, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Turn block output x[n, g, g, c] into a map n c' g g."""
        x = rearrange(x, "n y x c -> n c y x")
        out: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return out


class WindowAttention(nn.Module):
    """Attention over a square of patches with a learned bias for row distance and one for column distance."""

    def __init__(self, config: SamConfig, side: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.side = side
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        head_width = config.width // config.heads
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, head_width))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, head_width))

    def forward(self, x: Tensor) -> Tensor:
        """Mix x[n, g, g, c] over its patches, or where g is not the side w of a square over those of each
        window.
        """
        assert self.qkv.bias is not None
        x = self.qkv(x)  # n g g 3c
        x = self.mix(x) if x.shape[1] == self.side else in_windows(x, self.side, self.mix, fill=self.qkv.bias)
        out: Tensor = self.proj(x)
        return out

    def mix(self, qkv: Tensor) -> Tensor:
        """Return what the heads see, f[n, w, w, c], in squares of projected patches f[n, w, w, 3c]."""
        n = len(qkv)
        q, k, v = rearrange(qkv, "n y x (three h e) -> three (n h) (y x) e", three=3, h=self.heads)
        rows, columns = self.distances(q)

        def bias(heads: slice, patches: slice) -> Tensor:
            """Return what some patches of some heads add to their scores."""
            return (rows[heads, patches, :, None] + columns[heads, patches, None, :]).flatten(2)

        x = attend_in_blocks(q, k, v, bias=bias)  # (n h) (w w) e
        return rearrange(x, "(n h) (y x) e -> n y x (h e)", n=n, y=self.side)

    def distances(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return what queries f[g, w*w, e], which are *not* scaled here, add to the scores of each row of
        keys and of each column: f[g, w*w, s] both. The bias of a key is the sum of its row's and its
        column's.
        """
        offset = torch.arange(self.side, device=q.device)
        offset = offset[:, None] - offset[None, :] + self.side - 1  # w s
        q = rearrange(q, "g (y x) e -> g y x e", y=self.side)
        rows = torch.einsum("gyxe,yse->gyxs", q, self.rel_pos_h[offset])
        columns = torch.einsum("gyxe,xse->gyxs", q, self.rel_pos_w[offset])
        return rows.flatten(1, 2), columns.flatten(1, 2)


class Block(nn.Module):
    """Pre-norm block whose attention is global or confined to windows."""

    def __init__(self, config: SamConfig, *, is_global: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = WindowAttention(config, config.grid if is_global else config.window)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width, gelu="erf")

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and MLP to x[n, g, g, c], each added to the stream."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def in_windows(x: Tensor, w: int, mix: Callable[[Tensor], Tensor], *, fill: Tensor | None = None) -> Tensor:
    """Apply `mix` to each w x w window of x[n, g, g, c] and put the map together again.

    The map is padded at the bottom and on the right to a multiple of w, with zeros or with `fill` f[c]. The
    padding takes part in the attention: the published weights were trained with zeros before the projection,
    of which its bias is left behind it.

        64 -> 70 = 5 windows of 14;   the last window of a row holds 8 real columns and 6 of padding
    """
    n, g, _, c = x.shape
    count = math.ceil(g / w)
    padded = x.new_zeros(c) if fill is None else fill.to(x.dtype)
    padded = padded.expand(n, count * w, count * w, c).clone()
    padded[:, :g, :g] = x  # n (count w) (count w) c
    x = rearrange(padded, "n (a y) (b x) c -> (n a b) y x c", y=w, x=w)
    x = mix(x)
    x = rearrange(x, "(n a b) y x c -> n (a y) (b x) c", n=n, a=count)
    return x[:, :g, :g].contiguous()


class Sam(nn.Module):
    """The tower with its neck, side branch and downsampling."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.width))
        self.blocks = nn.ModuleList(
            Block(config, is_global=layer in config.global_layers) for layer in range(config.layers)
        )
        self.neck = Neck(config)
        self.neck_hd = Neck(config)
        first, second = config.downsample_channels
        self.downsamples = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False)
            for a, b in ((config.neck_channels, first), (first, second))
        )
        self.hd_alpha = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: Tensor, *, normalized: bool = False) -> Tensor:
        """Turn pictures f[n, 3, S, S] into features f[n, t, c] on a grid of resize_side / 4, row-major.

        `normalized` as in Siglip. Another picture side raises SeekVLError.
        """
        side = self.config.image_size
        if pixels.shape[1:] != (3, side, side):
            raise SeekVLError(f"SAM takes pictures of 3 x {side} x {side}, got {tuple(pixels.shape[1:])}")
        if not normalized:
            if self.config.pixel_mean is None or self.config.pixel_std is None:
                raise SeekVLError("this SAM tower has no pixel mean: its processor must normalise the pixels")
            pixels = normalise(pixels, mean=self.config.pixel_mean, std=self.config.pixel_std)
        x = embed_patches(self.patch_embed, pixels)  # n g g c
        x, side_branch = self.transform(x + self.pos_embed)
        # The paper downsamples both and adds then; as nothing of it bends, the sum can be downsampled as one.
        x = self.downsample(self.neck(x) + self.neck_hd(side_branch) * self.hd_alpha)
        return rearrange(x, "n c y x -> n (y x) c")

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the last block makes of embedded patches f[n, g, g, c], and what the first global one
        does.
        """
        side_branch = None
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if layer == self.config.global_layers[0]:
                side_branch = x
        assert side_branch is not None
        return x, side_branch

    def downsample(self, x: Tensor) -> Tensor:
        """Resize a neck map to resize_side in float32, then halve it twice; no activation lies between."""
        side = self.config.resize_side
        x = F.interpolate(x.float(), size=(side, side), mode="bilinear", align_corners=False).to(x.dtype)
        for conv in self.downsamples:
            x = conv(x)
        return x
