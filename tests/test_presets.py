import pytest

from seekvl.models.vl import on_meta
from seekvl.presets import CHECKPOINTS, SHORT_NAMES
from seekvl.processing.pad_image import visual_tokens


def test_published_names() -> None:
    assert list(SHORT_NAMES) == [
        "deepseek-vl-1.3b-base",
        "deepseek-vl-1.3b-chat",
        "deepseek-vl-7b-base",
        "deepseek-vl-7b-chat",
    ]
    assert set(SHORT_NAMES.values()) == set(CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_processor_and_towers_count_the_same_visual_tokens(name: str) -> None:
    preset = CHECKPOINTS[name]
    assert visual_tokens(preset.image) == preset.model.visual_tokens == 576
    assert preset.image.image_size == preset.model.image_size


@pytest.mark.parametrize(("name", "used"), [("1.3b", 1_962_640_384), ("7b", 7_331_390_721)])
def test_parameters_in_use(name: str, used: int) -> None:
    """The totals of the published files, less their pooling heads and unused norms."""
    model = on_meta(CHECKPOINTS[f"deepseek-ai/deepseek-vl-{name}-chat"].model)
    assert sum(parameter.numel() for parameter in model.parameters()) == used


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_pixels_are_normalised_once_in_the_towers(name: str) -> None:
    preset = CHECKPOINTS[name]
    assert not preset.image.do_normalize
    assert preset.image.pad_colour == ((127, 127, 127) if "1.3b" in name else (122, 116, 104))
