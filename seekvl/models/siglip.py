"""SigLIP vision transformer: the low-resolution tower of DeepSeek-VL (2403.05525, sec. 3.1), the only one of
the 1.3B.

Letters: n pictures, t patches (g x g, row-major), c width, h heads, e width of a head.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seekvl.models.attention import attend
from seekvl.runtime import SeekVLError, check_positive

Gelu = Literal["erf", "tanh"]
Rgb = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiglipConfig:
    """Dimensions of a SigLIP tower; the published one is siglip_large_patch16_384."""

    image_size: int
    """Side of the square picture, px."""
    patch_size: int
    """Side of a patch, px."""
    width: int
    """Channels c of the residual stream."""
    layers: int
    heads: int
    mlp_width: int
    """Hidden channels of the MLP."""
    gelu: Gelu = "erf"
    """The published DeepSeek-VL files need the exact GELU; the tanh form moves features by 1e-3 (golden
    vl1-siglip).
    """
    norm_eps: float = 1e-6
    pixel_mean: Rgb | None = None
    """Per-channel mean subtracted inside the tower; None where the processor normalises."""
    pixel_std: Rgb | None = None

    def __post_init__(self) -> None:
        check_positive("SigLIP", self)
        if self.width % self.heads:
            raise SeekVLError(f"SigLIP width {self.width} is not divisible by its {self.heads} heads")
        if self.image_size < self.patch_size:
            raise SeekVLError(
                f"SigLIP image_size {self.image_size} is smaller than its patch of {self.patch_size} px"
            )
        if (self.pixel_mean is None) != (self.pixel_std is None):
            raise SeekVLError("SigLIP needs both pixel_mean and pixel_std, or neither")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


def normalise(pixels: Tensor, *, mean: Rgb, std: Rgb) -> Tensor:
    """Return (pixels - mean) / std of f[n, 3, y, x], in the dtype of the pixels like the reference."""
    shape = (1, 3, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


class Attention(nn.Module):
    """Full bidirectional attention with one fused projection, rows ordered q, k, v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x[n, t, c] over all its patches."""
        q, k, v = rearrange(self.qkv(x), "n t (three h e) -> three n h t e", three=3, h=self.heads)
        x = attend(q, k, v)  # n h t e
        out: Tensor = self.proj(rearrange(x, "n h t e -> n t (h e)"))  # n t c
        return out


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, mlp_width: int, *, gelu: Gelu) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.approximate = "none" if gelu == "erf" else "tanh"

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of x[..., c] alone."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))
        return out


class Block(nn.Module):
    """Pre-norm transformer block without dropout or layer scale."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width, gelu=config.gelu)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and MLP to x[n, t, c], each added to the stream."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def embed_patches(conv: nn.Conv2d, pixels: Tensor) -> Tensor:
    """Return f[n, g, g, c] of pictures f[n, 3, S, S] for a convolution whose kernels lie side by side; pixels
    behind the last whole patch are left out, as a convolution does.

    Such a one is a linear layer of patches, which oneDNN computes three times as fast as the convolution in
    bfloat16; and what comes out is contiguous, where a stream in the layout of a convolution is slow in each
    block.

    >>> conv, pixels = nn.Conv2d(3, 5, 2, stride=2), torch.rand(1, 3, 7, 7)
    >>> torch.allclose(embed_patches(conv, pixels), conv(pixels).movedim(1, -1), atol=1e-6)
    True
    """
    p = conv.kernel_size[0]
    used = pixels.shape[-1] // p * p
    pixels = pixels[..., :used, :used]
    patches = rearrange(pixels, "n k (y a) (x b) -> n y x (k a b)", a=p, b=p)  # n g g (3 p p)
    return F.linear(patches, conv.weight.flatten(1), conv.bias)


class Siglip(nn.Module):
    """The tower: patches, learned positions, blocks, final norm. All patch tokens are returned, none is
    pooled.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, pixels: Tensor, *, normalized: bool = False) -> Tensor:
        """Turn pictures f[n, 3, S, S] into patch features f[n, t, c].

        `normalized` says that mean and deviation are already applied; otherwise pixels are in 0..1 and the
        tower applies its own. The position table is used as it is: another picture side raises SeekVLError.
        """
        side = self.config.image_size
        if pixels.shape[1:] != (3, side, side):
            raise SeekVLError(f"SigLIP takes pictures of 3 x {side} x {side}, got {tuple(pixels.shape[1:])}")
        if not normalized:
            if self.config.pixel_mean is None or self.config.pixel_std is None:
                raise SeekVLError(
                    "this SigLIP tower has no pixel mean: its processor must normalise the pixels"
                )
            pixels = normalise(pixels, mean=self.config.pixel_mean, std=self.config.pixel_std)
        x = embed_patches(self.patch_embed, pixels).flatten(1, 2)  # n t c
        return self.transform(x + self.pos_embed)

    def transform(self, x: Tensor) -> Tensor:
        """Return the features f[n, t, c] of embedded patches f[n, t, c]."""
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out
