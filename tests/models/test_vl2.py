from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.moe import RouterRecord
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VL
from seekvl.models.vl2 import VL2, Grid, VL2Config, on_meta
from seekvl.runtime import SeekVLError
from tests.models.test_deepseek_v2 import BASE, TINY
from tests.models.test_vl import SINGLE

VISION = SiglipConfig(
    image_size=43, patch_size=8, width=16, layers=1, heads=2, mlp_width=32, gelu="tanh"
)  # 5 x 5 patches, 3 x 3 features
CONFIG = VL2Config(
    vision=VISION,
    adaptor=AdaptorConfig(kind="downsample_mlp_gelu", input_width=16, width=32, downsample=2),
    language=BASE,
)
PUBLISHED = replace(
    CONFIG,
    vision=replace(VISION, image_size=384, patch_size=14, width=1152, heads=16),
    adaptor=replace(CONFIG.adaptor, input_width=1152),
)
SLOT = 49


def make(config: VL2Config = CONFIG) -> VL2:
    torch.manual_seed(0)
    model = VL2(config)
    torch.nn.init.normal_(model.image_newline)
    torch.nn.init.normal_(model.view_separator)
    return model


def tiles(count: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, 43, 43)


def slow_picture(model: VL2, pixels: Tensor, grid: Grid) -> list[Tensor]:
    """Rows of one picture, place by place; a picture of grid (1, 1) is given twice here."""
    g, (columns, rows) = model.config.view_side, grid
    features = model.adaptor(model.vision(pixels, normalized=True))
    whole, mosaic = [], []
    for y in range(g):
        whole += [features[0, y * g + x] for x in range(g)] + [model.image_newline]
    for y in range(g * rows):
        for x in range(g * columns):
            tile = 1 + (y // g) * columns + x // g
            mosaic.append(features[tile, (y % g) * g + x % g])
        mosaic.append(model.image_newline)
    if model.config.global_first:
        return [*whole, model.view_separator, *mosaic]
    return [*mosaic, model.view_separator, *whole]


@pytest.mark.parametrize("global_first", [True, False])
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_a_picture_is_laid_out_place_by_place(grid: Grid, global_first: bool) -> None:
    model = make(replace(CONFIG, global_first=global_first))
    pixels = tiles(1 + grid[0] * grid[1])
    if grid == (1, 1):
        pixels = pixels[:1].expand(2, -1, -1, -1)
    expected = torch.stack(slow_picture(model, pixels, grid))
    found = model.encode_pictures(pixels[:1] if grid == (1, 1) else pixels, grids=[grid])
    assert len(found) == model.config.slots(grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_whole_of_a_small_picture_goes_through_the_tower_once() -> None:
    model, seen = make(), []
    model.vision.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    model.encode_pictures(tiles(2), grids=[(1, 1), (1, 1)])
    assert seen == [2]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_the_tower_in_chunks_equals_one_pass(chunk: int) -> None:
    model, seen, grids = make(), [], [(2, 1), (1, 1), (1, 2)]
    whole = model.encode_pictures(tiles(7), grids=grids)
    model.vision.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    found = model.encode_pictures(tiles(7), grids=grids, chunk=chunk)
    assert max(seen) == min(chunk, 7)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_a_picture_does_not_depend_on_its_company() -> None:
    model, grids = make(), [(2, 1), (1, 1)]
    both = model.encode_pictures(tiles(4), grids=grids)
    first = model.encode_pictures(tiles(4)[:3], grids=grids[:1])
    second = model.encode_pictures(tiles(4)[3:], grids=grids[1:])
    torch.testing.assert_close(both, torch.cat((first, second)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "slots"),
    [((1, 1), 421), ((2, 1), 617), ((1, 2), 631), ((3, 3), 2017), ((9, 1), 1989), ((1, 9), 2101)],
)
def test_slots_of_published_grids(grid: Grid, slots: int) -> None:
    assert PUBLISHED.view_side == 14
    assert PUBLISHED.slots(grid) == slots


def test_tiles_and_grids_must_agree() -> None:
    with pytest.raises(SeekVLError, match="stand for 4 tiles, 3 were given"):
        make().encode_pictures(tiles(3), grids=[(2, 1), (1, 1)])
    with pytest.raises(SeekVLError, match="stand for 0 tiles"):
        make()(torch.tensor([[1]]), pixels=tiles(1))


def test_rows_stand_in_their_slots_and_gradients_reach_everything() -> None:
    model, grids = make(), [(2, 1), (1, 1)]
    slots = [model.config.slots(grid) for grid in grids]
    ids = torch.tensor([[1, *[SLOT] * slots[0], 2, *[SLOT] * slots[1], 3]])
    mask = ids == SLOT
    rows = model.encode_pictures(tiles(4), grids=grids)
    embeds = model.embed(ids, image_mask=mask, image_features=rows)
    assert torch.equal(embeds[0, 1 : 1 + slots[0]], rows[: slots[0]])
    assert torch.equal(embeds[0, 2 + slots[0] : -1], rows[slots[0] :])
    assert torch.equal(embeds[0, 0], model.language.embed_tokens.weight[1])
    logits = model(ids, image_mask=mask, pixels=tiles(4), grids=grids)
    assert logits.shape == (1, ids.shape[1], BASE.vocab_size)
    logits.square().mean().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {f"language.layers.{layer}.mlp.gate.bias" for layer in (1, 2)}


def test_slots_and_rows_must_agree() -> None:
    model = make()
    ids = torch.tensor([[1, SLOT, SLOT, 2]])
    with pytest.raises(SeekVLError, match=r"2 picture slots .* 25 feature rows"):
        model(ids, image_mask=ids == SLOT, pixels=tiles(1), grids=[(1, 1)])


def test_without_pixels_the_tower_does_not_run() -> None:
    model = make()
    model.vision.register_forward_hook(lambda *_: pytest.fail("the vision tower ran"))
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, BASE.vocab_size)


def test_a_record_passes_through() -> None:
    model, record = make(), RouterRecord()
    model.hidden(torch.randn(1, 4, 32), record=record)
    assert set(record.loads) == {1, 2}


def test_a_module_cast_to_bfloat16_lays_out_in_bfloat16() -> None:
    rows = make().bfloat16().encode_pictures(tiles(3).bfloat16(), grids=[(2, 1)])
    assert rows.dtype == torch.bfloat16


@pytest.mark.parametrize("language", [TINY, BASE])
def test_autocast_stays_near_float32_and_trains(language: DeepseekV2Config) -> None:
    model = make(replace(CONFIG, language=language))
    ids = torch.tensor([[1, *[SLOT] * 25, 2, 3]])
    given = {"image_mask": ids == SLOT, "pixels": tiles(1), "grids": [(1, 1)]}
    exact = model(ids, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids, **given)
    assert float((found - exact).detach().abs().mean()) < 0.05 * float(exact.detach().std())
    found.float().square().mean().backward()
    finite = [p.grad.isfinite().all() for p in model.parameters() if p.grad is not None]
    assert len(finite) > 40
    assert all(finite)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptor": replace(CONFIG.adaptor, input_width=8)}, "hands on width 16"),
        ({"adaptor": replace(CONFIG.adaptor, width=26)}, "width 26"),
        ({"adaptor": AdaptorConfig(kind="low_high_hybrid_split_mlp_gelu", input_width=16, width=32)}, "fit"),
    ],
)
def test_parts_must_fit(change: dict[str, AdaptorConfig], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        replace(CONFIG, **change)


def test_on_meta_builds_either_family_without_memory() -> None:
    for config, family in ((CONFIG, VL2), (replace(CONFIG, language=TINY), VL2), (SINGLE, VL)):
        model = on_meta(config)
        assert type(model) is family
        assert {p.device.type for p in model.parameters()} == {"meta"}
