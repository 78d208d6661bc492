"""The hybrid vision encoder of DeepSeek-VL-7B: SAM-B for detail and SigLIP for meaning (2403.05525, sec.
3.1).

Letters: n pictures, S side of the high-resolution picture, s side of the low one, t features a picture, c
width.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.models.sam import Sam, SamConfig
from seekvl.models.siglip import Siglip, SiglipConfig
from seekvl.runtime import SeekVLError


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridConfig:
    """The two towers, which must hand on the same grid."""

    high: SamConfig
    low: SiglipConfig

    def __post_init__(self) -> None:
        if self.high.out_grid != self.low.grid:
            raise SeekVLError(
                f"the towers disagree: SAM hands on {self.high.out_grid} x {self.high.out_grid} features, "
                f"SigLIP {self.low.grid} x {self.low.grid}"
            )
        if self.high.downsample_channels[1] != self.low.width:
            raise SeekVLError(
                f"the towers disagree: SAM hands on {self.high.downsample_channels[1]} channels, "
                f"SigLIP {self.low.width}"
            )


class Hybrid(nn.Module):
    """Both towers over one picture."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.high = Sam(config.high)
        self.low = Siglip(config.low)

    def forward(
        self, pixels: Tensor, *, low_pixels: Tensor | None = None, normalized: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the features (high, low), each f[n, t, c], of pictures f[n, 3, S, S].

        Without `low_pixels` f[n, 3, s, s] the low picture is made here, from the un-normalised high one, as
        the official code does; the other pipeline brings its own.
        """
        if low_pixels is None:
            if normalized:
                raise SeekVLError(
                    "normalised pixels need low_pixels too: the low picture is made before normalisation"
                )
            low_pixels = self.shrink(pixels)
        return self.high(pixels, normalized=normalized), self.low(low_pixels, normalized=normalized)

    def shrink(self, pixels: Tensor) -> Tensor:
        """Make the low picture f[n, 3, s, s]: bilinear with antialiasing, in float32, rounded back to the
        dtype.
        """
        side = self.config.low.image_size
        low = F.interpolate(
            pixels.float(), size=(side, side), mode="bilinear", align_corners=False, antialias=True
        )
        return low.to(pixels.dtype)
