import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seekvl.processing.pad_image import (
    ORIENTATION_TAG,
    PadImageConfig,
    check_mode,
    content_box,
    prepare_picture,
    resized_size,
    upright,
    visual_tokens,
)
from seekvl.processing.picture import open_picture
from seekvl.runtime import SeekVLError

CONFIG = PadImageConfig(image_size=96, patch_slots_side=6)
HYBRID = PadImageConfig(
    image_size=128,
    patch_slots_side=6,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    low_size=48,
)
GOLDEN = Path(__file__).parents[1] / "golden"


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def test_visual_tokens() -> None:
    assert visual_tokens(CONFIG) == 36


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (96, 96)),
        ((2000, 20), (96, 14)),
        ((20000, 3), (96, 14)),
        ((3, 20000), (14, 96)),
        ((640, 480), (96, 72)),
    ],
)
def test_resized_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*size, CONFIG, mode="official") == expected


def test_absurd_pictures_work() -> None:
    for size in ((1, 1), (20000, 3), (3, 20000)):
        for mode in ("seekvl", "official", "transformers"):
            pixels = prepare_picture(Image.new("RGB", size, "red"), CONFIG, mode=mode).pixels
            assert pixels.shape == (3, 96, 96)
            assert torch.isfinite(pixels).all()


def test_zero_size_is_refused() -> None:
    with pytest.raises(SeekVLError, match="0x5 px is zero-sized"):
        resized_size(0, 5, CONFIG, mode="official")


def test_rounding_differs_between_modes() -> None:
    assert resized_size(1024, 1023, CONFIG, mode="official") == (96, 95)
    assert resized_size(1024, 1023, CONFIG, mode="transformers") == (96, 96)


@pytest.mark.parametrize("mode", ["seekvl", "official", "transformers"])
def test_content_box_is_where_the_picture_is(mode: str) -> None:
    for size in ((60, 33), (33, 60), (7, 50), (40, 40)):
        left, top, right, bottom = content_box(*size, HYBRID, mode=check_mode(mode))
        pixels = prepare_picture(Image.new("RGB", size, "white"), HYBRID, mode=check_mode(mode)).pixels
        inside = torch.zeros(128, 128, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(pixels[0] == pixels[0].max(), inside)


def test_odd_padding_goes_right_and_below() -> None:
    left, top, right, bottom = content_box(96, 35, CONFIG, mode="official")
    assert (left, right) == (0, 96)
    assert (top, 96 - bottom) == (30, 31)


def test_pixels_are_bytes_over_255_on_the_pad_colour() -> None:
    image = noise(96, 48)
    pixels = prepare_picture(image, CONFIG, mode="official").pixels
    assert pixels.dtype == torch.float32
    slow = (np.asarray(image).astype(np.float64) * 0.00392156862745098).astype(np.float32)
    assert np.array_equal(pixels[:, 24:72].numpy(), slow.transpose(2, 0, 1))
    assert torch.equal(pixels[:, 0, 0], torch.full((3,), np.float32(127 / 255)))


def test_normalising_is_honoured() -> None:
    plain = prepare_picture(noise(50, 50), HYBRID, mode="official")
    config = PadImageConfig(
        image_size=128, patch_slots_side=6, mean=HYBRID.mean, std=HYBRID.std, do_normalize=True
    )
    done = prepare_picture(noise(50, 50), config, mode="official")
    assert (plain.normalized, done.normalized) == (False, True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (HYBRID.mean, HYBRID.std))
    assert torch.equal(done.pixels, (plain.pixels - mean) / std)


def test_transformers_mode_makes_the_low_picture() -> None:
    prepared = prepare_picture(noise(128, 128), HYBRID, mode="transformers")
    assert prepared.normalized
    assert prepared.low_pixels is not None
    small = np.asarray(noise(128, 128).resize((48, 48), Image.Resampling.BILINEAR))
    low = prepared.low_pixels.permute(1, 2, 0) * 0.5 + 0.5
    assert np.array_equal(torch.round(low * 255).numpy().astype(np.uint8), small)
    assert prepare_picture(noise(8, 8), HYBRID, mode="official").low_pixels is None
    assert prepare_picture(noise(8, 8), HYBRID, mode="seekvl").low_pixels is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """A picture stored turned looks as it did before, but for the official mode, which ignores the tag."""
    straight = noise(40, 24)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = straight.transpose(undo[orientation]) if orientation > 1 else straight.copy()
    raw = prepare_picture(stored, CONFIG, mode="official").pixels
    stored.getexif()[ORIENTATION_TAG] = orientation
    expected = prepare_picture(straight, CONFIG, mode="official").pixels
    prepared = prepare_picture(stored, CONFIG, mode="seekvl")
    assert torch.equal(prepared.pixels, expected)
    assert prepared.size == (40, 24)
    assert torch.equal(prepare_picture(stored, CONFIG, mode="official").pixels, raw)
    assert prepare_picture(stored, CONFIG, mode="transformers").size == (40, 24)


def test_exif_from_a_file() -> None:
    image = open_picture(GOLDEN / "images" / "exif6_120x80.png")
    assert prepare_picture(image, CONFIG, mode="official").size == (120, 80)
    assert prepare_picture(image, CONFIG, mode="seekvl").size == (80, 120)


def test_damaged_exif_counts_as_none(caplog: pytest.LogCaptureFixture) -> None:
    image = noise(10, 10)
    image.info["exif"] = b"Exif\0\0garbage that is no TIFF header"
    assert prepare_picture(image, CONFIG, mode="seekvl").size == (10, 10)
    assert "EXIF" in caplog.text


def see_through(mode: str) -> Image.Image:
    """Make a picture that is transparent everywhere, black underneath."""
    if mode == "P":
        image = Image.new("P", (20, 20), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.info["transparency"] = 0
        return image
    if mode == "RGB":
        image = Image.new("RGB", (20, 20))
        image.info["transparency"] = (0, 0, 0)
        return image
    return Image.new(mode, (20, 20), (0,) * len(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_alpha_lies_on_the_pad_colour(mode: str) -> None:
    image = see_through(mode)
    clear = prepare_picture(image, HYBRID, mode="seekvl").pixels
    for channel, value in zip(clear, HYBRID.pad_colour, strict=True):
        assert torch.all(channel == np.float32(value / 255))
    assert HYBRID.pad_colour == (122, 116, 104)
    assert torch.all(prepare_picture(image, HYBRID, mode="official").pixels == 0)


def test_half_transparent() -> None:
    image = Image.new("RGBA", (96, 96), (255, 255, 255, 128))
    pixels = prepare_picture(image, CONFIG, mode="seekvl").pixels
    assert torch.allclose(pixels, torch.tensor((255 * 128 + 127 * 127) / 255 / 255), atol=2 / 255)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_of_pillow(mode: str) -> None:
    image = Image.new(mode, (30, 20))
    for preprocessing in ("seekvl", "official", "transformers"):
        assert prepare_picture(image, CONFIG, mode=preprocessing).pixels.shape == (3, 96, 96)


def test_modes_agree_on_a_plain_picture() -> None:
    image = noise(96, 60)
    official = prepare_picture(image, CONFIG, mode="official").pixels
    assert torch.equal(prepare_picture(image, CONFIG, mode="seekvl").pixels, official)


def test_the_caller_s_picture_is_untouched() -> None:
    image = noise(20, 10, 4)
    before = image.tobytes()
    prepare_picture(image, CONFIG, mode="seekvl")
    assert image.tobytes() == before
    assert image.mode == "RGBA"


def test_prepared_pixels_are_not_shared() -> None:
    first = prepare_picture(noise(96, 96), CONFIG, mode="official").pixels
    first.zero_()
    assert prepare_picture(noise(96, 96), CONFIG, mode="official").pixels.max() > 0


def test_unknown_mode() -> None:
    with pytest.raises(SeekVLError, match=r"unknown preprocessing 'exact'.*'seekvl', 'official'"):
        check_mode("exact")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image_size": 0}, "image_size"),
        ({"patch_slots_side": 0}, "patch_slots_side"),
        ({"min_size": 97}, "min_size 97 exceeds image_size 96"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"low_size": 0}, "low_size"),
        ({"rescale_factor": 0.0}, "rescale_factor"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"low_mean": [0.5, 0.5, 0.5]}, "low_mean must be a tuple"),
        ({"background": (1, 2, 256)}, "background"),
    ],
)
def test_bad_config(change: dict[str, object], expected: str) -> None:
    with pytest.raises(SeekVLError, match=expected):
        PadImageConfig(**{"image_size": 96, "patch_slots_side": 6, **change})


def test_turning_upright_twice_is_turning_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=exif)
    once = upright(Image.open(buffer))
    assert once.size == (20, 30)
    assert upright(once).size == (20, 30)
