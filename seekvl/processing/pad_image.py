"""A picture of DeepSeek-VL: scaled to fit a square, padded around, as numbers (2403.05525, sec. 3.1).

Letters: S side of the square in px, s side of the low-resolution square in px.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from seekvl.processing.choices import Preprocessing
from seekvl.processing.picture import DECODE_ERRORS
from seekvl.runtime import SeekVLError, log

PREPROCESSING: tuple[Preprocessing, ...] = get_args(Preprocessing)

ORIENTATION_TAG = 0x0112  # EXIF 2.3, table 3

Colour = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PadImageConfig:
    """How a checkpoint wants its pictures (`preprocessor_config.json`)."""

    image_size: int
    """Side S of the square in px: 384 (1.3B) or 1024 (7B)."""
    patch_slots_side: int
    """Visual tokens along one side of the square: 24 in all published checkpoints, so 576 a picture."""
    min_size: int = 14
    """Least width and height of the scaled picture in px."""
    mean: Colour = (0.5, 0.5, 0.5)
    """Mean per channel, for values in 0..1."""
    std: Colour = (0.5, 0.5, 0.5)
    """Standard deviation per channel, for values in 0..1."""
    do_normalize: bool = False
    """Whether pixels leave as (x - mean) / std; False: as 0..1, and the vision tower normalises."""
    background: tuple[int, int, int] | None = None
    """Colour of the padding, 0..255; None: int(mean * 255)."""
    rescale_factor: float = 0.00392156862745098
    """From bytes to 0..1."""
    low_size: int | None = None
    """Side s of the low-resolution square in px (384 in the 7B); None: a single vision tower."""
    low_mean: Colour = (0.5, 0.5, 0.5)
    """Mean of the low-resolution picture, used in mode "transformers"."""
    low_std: Colour = (0.5, 0.5, 0.5)
    """Standard deviation of the low-resolution picture, used in mode "transformers"."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_slots_side", "min_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SeekVLError(
                    f"PadImageConfig.{name} must be a whole number of at least 1, not {value!r}"
                )
        if self.min_size > self.image_size:
            raise SeekVLError(f"PadImageConfig.min_size {self.min_size} exceeds image_size {self.image_size}")
        if self.low_size is not None and self.low_size < 1:
            raise SeekVLError(f"PadImageConfig.low_size must be at least 1 px, not {self.low_size}")
        for name in ("mean", "std", "low_mean", "low_std", "background"):
            check_colour(f"PadImageConfig.{name}", getattr(self, name))
        if not self.rescale_factor > 0:
            raise SeekVLError(f"PadImageConfig.rescale_factor must be above 0, not {self.rescale_factor}")

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """The colour around and behind the picture, 0..255."""
        if self.background is not None:
            return self.background
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue


def check_colour(name: str, value: tuple[float, ...] | None) -> None:
    """Refuse a field of a config that is no triple, a deviation of 0, or a background beyond bytes."""
    background = name.endswith(".background")
    if background and value is None:
        return
    if not isinstance(value, tuple) or len(value) != 3:
        raise SeekVLError(f"{name} must be a tuple of 3 numbers, not {value!r}")
    if name.endswith("std") and min(value) <= 0:
        raise SeekVLError(f"{name} must be above 0 in each channel, not {value!r}")
    if background and not all(isinstance(part, int) and 0 <= part <= 255 for part in value):
        raise SeekVLError(f"{name} must be 3 whole numbers from 0 to 255, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedPicture:
    """One picture, ready for the vision tower."""

    pixels: Tensor
    """f32[3, S, S]."""
    low_pixels: Tensor | None
    """f32[3, s, s] in mode "transformers" with two towers; else None, and the network derives it."""
    normalized: bool
    """Whether mean and standard deviation are already applied."""
    size: tuple[int, int]
    """Width and height of the original in px, after the EXIF orientation where the mode applies it."""


def visual_tokens(config: PadImageConfig) -> int:
    """Count the visual tokens a picture takes, whatever its size.

    >>> visual_tokens(PadImageConfig(image_size=384, patch_slots_side=24))
    576
    """
    return config.patch_slots_side**2


def check_mode(mode: str) -> Preprocessing:
    """Return the name of a preprocessing mode, or raise SeekVLError listing the three there are."""
    for known in PREPROCESSING:
        if mode == known:
            return known
    raise SeekVLError(f"unknown preprocessing {mode!r}: use {', '.join(map(repr, PREPROCESSING))}")


def resized_size(width: int, height: int, config: PadImageConfig, *, mode: Preprocessing) -> tuple[int, int]:
    """Compute width and height in px of the scaled picture inside the square.

    The longer side becomes S; the other is truncated, in "transformers" rounded, and never below `min_size`.
    The order of the floating-point operations matters: it decides a pixel row.

    Raises SeekVLError for a side below 1 px.

    >>> resized_size(2000, 20, PadImageConfig(image_size=384, patch_slots_side=24), mode="official")
    (384, 14)
    """
    if width < 1 or height < 1:
        raise SeekVLError(f"a picture of {width}x{height} px is zero-sized")
    longer, side = max(width, height), config.image_size
    if mode == "transformers":
        scale = side / longer
        return max(round(width * scale), config.min_size), max(round(height * scale), config.min_size)
    return max(int(width / longer * side), config.min_size), max(int(height / longer * side), config.min_size)


def content_box(
    width: int, height: int, config: PadImageConfig, *, mode: Preprocessing
) -> tuple[int, int, int, int]:
    """Locate the picture in its square: left, top, right, bottom in px; odd padding is right or below.

        +-----------+
        |  padding  | top
        |###########|
        |##picture##|
        |###########|
        |  padding  | bottom
        +-----------+

    >>> content_box(640, 480, PadImageConfig(image_size=384, patch_slots_side=24), mode="official")
    (0, 48, 384, 336)
    """
    w, h = resized_size(width, height, config, mode=mode)
    left, top = (config.image_size - w) // 2, (config.image_size - h) // 2
    return left, top, left + w, top + h


def prepare_picture(image: Image.Image, config: PadImageConfig, *, mode: Preprocessing) -> PreparedPicture:
    """Turn a decoded picture into what the vision tower takes.

    "official" is the reference bit for bit: EXIF orientation ignored, alpha dropped. "seekvl" is the same
    with the orientation applied and transparent parts on the padding colour. "transformers" rounds sizes,
    applies the orientation, always normalises, and makes the low-resolution picture from the padded one
    in 8 bits.
    """
    if mode != "official":
        image = upright(image)
    size = image.size
    square = _padded(to_rgb(image, backdrop=config.pad_colour, mode=mode), config, mode=mode)
    if mode != "transformers":
        pixels = _numbers(
            square, config.rescale_factor, config.mean, config.std, normalize=config.do_normalize
        )
        return PreparedPicture(pixels=pixels, low_pixels=None, normalized=config.do_normalize, size=size)
    pixels = _numbers(square, config.rescale_factor, config.mean, config.std, normalize=True)
    low = None
    if config.low_size is not None:
        small = square.resize((config.low_size, config.low_size), Image.Resampling.BILINEAR)
        low = _numbers(small, config.rescale_factor, config.low_mean, config.low_std, normalize=True)
    return PreparedPicture(pixels=pixels, low_pixels=low, normalized=True, size=size)


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation and forget it, so that doing so twice is doing so once.

    A damaged EXIF block counts as none, with a warning.
    """
    try:
        if image.getexif().get(ORIENTATION_TAG, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS as error:
        log.warning("a picture's EXIF block cannot be read (%s); it is taken as upright", error)
        return image


def to_rgb(image: Image.Image, *, backdrop: tuple[int, int, int], mode: Preprocessing) -> Image.Image:
    """Convert to RGB, with transparent parts on the colour of the backdrop in mode "seekvl".

    Raises SeekVLError for a mode of PIL that cannot be converted.
    """
    try:
        if mode != "seekvl" or not image.has_transparency_data:
            return image.convert("RGB")
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
    except DECODE_ERRORS as error:
        raise SeekVLError(f"a picture of mode {image.mode} cannot be converted to RGB ({error})") from error
    behind = Image.new("RGBA", image.size, (*backdrop, 255))
    return Image.alpha_composite(behind, image).convert("RGB")


def _padded(image: Image.Image, config: PadImageConfig, *, mode: Preprocessing) -> Image.Image:
    """Scale to fit the square (bicubic) and pad around the middle."""
    box = content_box(image.width, image.height, config, mode=mode)
    scaled = image.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
    if scaled.size == (config.image_size, config.image_size):
        return scaled
    square = Image.new("RGB", (config.image_size, config.image_size), config.pad_colour)
    square.paste(scaled, box[:2])
    return square


def _numbers(square: Image.Image, rescale: float, mean: Colour, std: Colour, *, normalize: bool) -> Tensor:
    """Turn a square into f32[3, S, S]."""
    values = np.asarray(square)
    pixels = np.empty((3, *values.shape[:2]), dtype=np.float32)
    look_up(values, _table(rescale, mean, std, normalize), out=pixels)
    return torch.from_numpy(pixels)


def look_up(picture: np.ndarray, table: np.ndarray, *, out: np.ndarray) -> None:
    """Look bytes u8[S, S, 3] up in their 256 float values f32[3, 256], into f32[3, S, S].

    The numbers are the reference's, for the cost of a copy.
    """
    for values, channel, plane in zip(table, picture.transpose(2, 0, 1), out, strict=True):
        np.take(values, channel, out=plane, mode="clip")  # "clip" skips a buffer; bytes stay in the table


@lru_cache(maxsize=32)
def _table(rescale: float, mean: Colour, std: Colour, normalize: bool) -> np.ndarray:
    """Compute f32[3, 256]: the product in float64 rounded once, then mean and deviation in float32."""
    values = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
    table = np.tile(values, (3, 1))
    if normalize:
        table = (table - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    return table
