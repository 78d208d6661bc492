import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.hybrid import HybridConfig
from seekvl.models.llama import LlamaConfig
from seekvl.models.sam import SamConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VL, VLConfig
from seekvl.models.vl2 import on_meta
from seekvl.runtime import SeekVLError

HALF = (0.5, 0.5, 0.5)
LOW = SiglipConfig(
    image_size=32, patch_size=8, width=16, layers=1, heads=2, mlp_width=32, pixel_mean=HALF, pixel_std=HALF
)
HIGH = SamConfig(
    image_size=64,
    patch_size=8,
    width=16,
    layers=2,
    heads=2,
    mlp_width=32,
    window=3,
    global_layers=(1,),
    neck_channels=8,
    downsample_channels=(8, 16),
    resize_side=16,
    pixel_mean=HALF,
    pixel_std=HALF,
)
LANGUAGE = LlamaConfig(vocab_size=40, width=24, layers=2, heads=2, kv_heads=2, mlp_width=32)
SINGLE = VLConfig(
    vision=LOW, adaptor=AdaptorConfig(kind="mlp_gelu", input_width=16, width=24), language=LANGUAGE
)
HYBRID = VLConfig(
    vision=HybridConfig(high=HIGH, low=LOW),
    adaptor=AdaptorConfig(kind="low_high_hybrid_split_mlp_gelu", input_width=16, width=24),
    language=LANGUAGE,
)


def tokens(*, pictures: int, slots: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[1, 2] + [39] * slots * pictures + [3, 4]])
    return ids, ids == 39


@pytest.mark.parametrize("config", [SINGLE, HYBRID])
def test_picture_rows_stand_in_the_slots_in_order(config: VLConfig) -> None:
    torch.manual_seed(0)
    model = VL(config)
    ids, mask = tokens(pictures=2)
    pixels = torch.rand(2, 3, config.image_size, config.image_size)
    features = model.encode_pictures(pixels)
    assert features.shape == (2, config.visual_tokens, 24)
    embeds = model.embed(ids, image_mask=mask, image_features=features)
    assert torch.equal(embeds[0, 2:34], features.flatten(0, 1))
    assert torch.equal(embeds[0, :2], model.language.embed_tokens(torch.tensor([1, 2])))


def test_gradients_reach_towers_and_words_through_the_splice() -> None:
    model = VL(HYBRID)
    ids, mask = tokens(pictures=1)
    model(ids, image_mask=mask, pixels=torch.rand(1, 3, 64, 64)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_without_pixels_the_towers_do_not_run() -> None:
    model = VL(HYBRID)
    model.vision.register_forward_hook(lambda *_: pytest.fail("the vision tower ran"))
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 40)


@pytest.mark.parametrize(("slots", "pictures"), [(15, 1), (16, 2), (17, 1)])
def test_slots_and_rows_must_agree(slots: int, pictures: int) -> None:
    model = VL(SINGLE)
    ids, mask = tokens(pictures=1, slots=slots)
    with pytest.raises(SeekVLError, match=f"{slots} picture slots .* {16 * pictures} feature rows"):
        model(ids, image_mask=mask, pixels=torch.rand(pictures, 3, 32, 32))


def test_pictures_without_slots_are_not_ignored() -> None:
    with pytest.raises(SeekVLError, match="0 picture slots"):
        VL(SINGLE)(torch.tensor([[1, 2]]), pixels=torch.rand(1, 3, 32, 32))


def test_the_low_picture_is_made_before_normalisation_unless_given() -> None:
    model = VL(HYBRID)
    pixels = torch.rand(1, 3, 64, 64)
    low = model.vision.shrink(pixels)
    assert low.shape == (1, 3, 32, 32)
    assert torch.equal(model.encode_pictures(pixels), model.encode_pictures(pixels, low_pixels=low))
    with pytest.raises(SeekVLError, match="need low_pixels"):
        model.encode_pictures(pixels, normalized=True)
    with pytest.raises(SeekVLError, match="single tower"):
        VL(SINGLE).encode_pictures(torch.rand(1, 3, 32, 32), low_pixels=low)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptor": SINGLE.adaptor}, "does not fit"),
        ({"adaptor": replace(HYBRID.adaptor, input_width=8)}, "hands on width 16"),
        ({"adaptor": replace(HYBRID.adaptor, width=26)}, "width 26"),
    ],
)
def test_parts_must_fit(change: dict[str, AdaptorConfig], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        replace(HYBRID, **change)


@pytest.mark.parametrize(
    ("high", "low", "message"),
    [
        (replace(HIGH, resize_side=32), LOW, "8 x 8 features, SigLIP 4 x 4"),
        (replace(HIGH, downsample_channels=(8, 8)), LOW, "8 channels, SigLIP 16"),
    ],
)
def test_towers_must_fit(high: SamConfig, low: SiglipConfig, message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        HybridConfig(high=high, low=low)


def test_on_meta_takes_no_memory() -> None:
    assert {p.device.type for p in on_meta(HYBRID).parameters()} == {"meta"}


def test_building_without_memory_does_not_import_the_compiler() -> None:
    program = (
        "import sys; from seekvl.models.vl2 import on_meta; from seekvl.presets import VL_1B\n"
        "model = on_meta(VL_1B.model)\n"
        "assert all(parameter.is_meta for parameter in model.parameters())\n"
        "assert 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
