import pytest
import torch
from torch import Tensor

from seekvl.models.siglip import Siglip, SiglipConfig, embed_patches, normalise
from seekvl.runtime import SeekVLError

CONFIG = SiglipConfig(
    image_size=32,
    patch_size=8,
    width=24,
    layers=2,
    heads=3,
    mlp_width=48,
    pixel_mean=(0.5, 0.4, 0.3),
    pixel_std=(0.2, 0.3, 0.4),
)


@pytest.fixture
def tower() -> Siglip:
    torch.manual_seed(0)
    tower = Siglip(CONFIG).eval()
    torch.nn.init.normal_(tower.pos_embed)
    return tower


def test_a_batch_equals_single_pictures(tower: Siglip) -> None:
    pixels = torch.rand(3, 3, 32, 32)
    together = tower(pixels)
    assert together.shape == (3, 16, 24)
    for n in range(3):
        torch.testing.assert_close(together[n : n + 1], tower(pixels[n : n + 1]), rtol=0, atol=1e-5)


def test_the_stream_is_contiguous(tower: Siglip) -> None:
    """In the layout of a convolution every sum and norm would copy it."""
    seen: list[Tensor] = []
    for block in tower.blocks:
        block.register_forward_hook(lambda _module, inputs, output: seen.extend((inputs[0], output)))
    tower(torch.rand(2, 3, 32, 32))
    assert len(seen) == 4
    assert all(x.is_contiguous() for x in seen)


def test_answers_in_bfloat16_equal_those_of_the_form_that_learns(
    tower: Siglip,
) -> None:
    """Answers attend in blocks, learning keeps the scores: the same numbers but for rounding."""
    pixels = torch.rand(2, 3, 32, 32).bfloat16()
    exact = tower(pixels.float()).detach()
    learned = tower.bfloat16()(pixels)
    with torch.no_grad():
        answered = tower(pixels)
    for rough in (learned, answered):
        torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.06)
    torch.testing.assert_close(answered, learned, rtol=0, atol=0.06)


def test_patches_are_row_major(tower: Siglip) -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, :, 8:16, 24:32] = 1.0  # row 1, column 3
    embedded = embed_patches(tower.patch_embed, pixels).flatten(1, 2)
    changed = (embedded - embedded[:, :1]).abs().sum(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [7]


def test_normalisation_inside_equals_normalisation_outside(tower: Siglip) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    outside = normalise(pixels, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert torch.equal(tower(pixels), tower(outside, normalized=True))


def test_the_two_gelus_differ_enough_for_a_test_to_see() -> None:
    torch.manual_seed(0)
    erf = Siglip(CONFIG)
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | {"gelu": "tanh"}
    tanh = Siglip(SiglipConfig(**fields))
    tanh.load_state_dict(erf.state_dict())
    pixels = torch.rand(1, 3, 32, 32)
    assert 1e-5 < (erf(pixels) - tanh(pixels)).abs().max() < 1e-1


def test_another_picture_side_is_refused(tower: Siglip) -> None:
    with pytest.raises(SeekVLError, match="3 x 32 x 32"):
        tower(torch.rand(1, 3, 40, 32))


def test_a_tower_without_mean_refuses_raw_pixels() -> None:
    tower = Siglip(SiglipConfig(image_size=16, patch_size=8, width=8, layers=1, heads=1, mlp_width=8))
    with pytest.raises(SeekVLError, match="must normalise"):
        tower(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "not divisible"),
        ({"image_size": 4}, "smaller than its patch"),
        ({"pixel_std": None}, "both pixel_mean and pixel_std"),
    ],
)
def test_impossible_dimensions_are_refused(change: dict[str, object], message: str) -> None:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | change
    with pytest.raises(SeekVLError, match=message):
        SiglipConfig(**fields)  # type: ignore[arg-type]
