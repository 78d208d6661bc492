import pytest

from seekvl.models.vl import VLConfig
from seekvl.models.vl2 import VL2Config, _tile_count, on_meta
from seekvl.presets import CHECKPOINTS, SHORT_NAMES
from seekvl.processing import tile_image
from seekvl.processing.pad_image import PadImageConfig, visual_tokens
from seekvl.processing.tile_image import TileImageConfig

VL = [name for name in CHECKPOINTS if "vl2" not in name]
VL2 = [name for name in CHECKPOINTS if "vl2" in name]


def test_published_names() -> None:
    assert list(SHORT_NAMES) == [
        "deepseek-vl-1.3b-base",
        "deepseek-vl-1.3b-chat",
        "deepseek-vl-7b-base",
        "deepseek-vl-7b-chat",
        "deepseek-vl2-tiny",
        "deepseek-vl2-small",
        "deepseek-vl2",
    ]
    assert set(SHORT_NAMES.values()) == set(CHECKPOINTS)


@pytest.mark.parametrize("name", VL)
def test_processor_and_towers_count_the_same_visual_tokens(name: str) -> None:
    preset = CHECKPOINTS[name]
    assert isinstance(preset.image, PadImageConfig)
    assert isinstance(preset.model, VLConfig)
    assert visual_tokens(preset.image) == preset.model.visual_tokens == 576
    assert preset.image.image_size == preset.model.image_size


POOLING_HEAD = 15_238_352
"""Parameters of the pooling head behind the tower of DeepSeek-VL2, which is stored and never run."""

USED = [
    ("vl-1.3b-chat", 1_962_640_384),
    ("vl-7b-chat", 7_331_390_721),
    ("vl2-tiny", 3_370_501_440 - POOLING_HEAD),
    ("vl2-small", 16_148_349_504 - POOLING_HEAD),
    ("vl2", 27_480_134_248 - POOLING_HEAD),
]


@pytest.mark.parametrize(("name", "used"), USED)
def test_parameters_in_use(name: str, used: int) -> None:
    """The totals of the published files, less their pooling heads and unused norms."""
    model = on_meta(CHECKPOINTS[f"deepseek-ai/deepseek-{name}"].model)
    assert sum(parameter.numel() for parameter in model.parameters()) == used


@pytest.mark.parametrize("name", VL)
def test_pixels_are_normalised_once_in_the_towers(name: str) -> None:
    preset = CHECKPOINTS[name]
    assert isinstance(preset.image, PadImageConfig)
    assert not preset.image.do_normalize
    assert preset.image.pad_colour == ((127, 127, 127) if "1.3b" in name else (122, 116, 104))


@pytest.mark.parametrize("name", VL2)
def test_processor_and_network_count_the_same_slots_and_tiles_of_every_grid(name: str) -> None:
    preset = CHECKPOINTS[name]
    model, image = preset.model, preset.image
    assert isinstance(model, VL2Config)
    assert isinstance(image, TileImageConfig)
    assert len(image.grids) == 23
    assert (image.image_size, image.view_side) == (model.image_size, model.view_side) == (384, 14)
    counted = {grid: tile_image.visual_tokens(grid, image) for grid in image.grids}
    assert counted == {grid: model.slots(grid) for grid in image.grids}
    assert (counted[1, 1], counted[4, 2], counted[3, 3], counted[1, 9]) == (421, 1807, 2017, 2101)


def test_network_takes_as_many_tiles_as_the_processor_makes() -> None:
    image = CHECKPOINTS["deepseek-ai/deepseek-vl2-tiny"].image
    assert isinstance(image, TileImageConfig)
    assert [_tile_count(grid) for grid in image.grids] == [
        tile_image.tile_count(grid) for grid in image.grids
    ]


@pytest.mark.parametrize(("name", "numbers"), [("vl2-tiny", 30_720), ("vl2-small", 15_552), ("vl2", 17_280)])
def test_cache_of_a_token(name: str, numbers: int) -> None:
    """Latent attention keeps 576 numbers per token and layer."""
    language = CHECKPOINTS[f"deepseek-ai/deepseek-{name}"].model.language
    assert sum(heads * width for heads, width in language.cache_shape) * language.layers == numbers


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_part_of_a_preset_takes_memory_before_it_is_loaded(name: str) -> None:
    model = on_meta(CHECKPOINTS[name].model)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
