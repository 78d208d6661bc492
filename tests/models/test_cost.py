from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from seekvl.models import cost
from seekvl.models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from seekvl.models.vl import VL, VLConfig
from seekvl.models.vl2 import VL2
from seekvl.presets import CHECKPOINTS, VL2_TINY
from tests.models.test_deepseek_v2 import BASE, TINY
from tests.models.test_llama import GrowingCache
from tests.models.test_vl import HYBRID, SINGLE
from tests.models.test_vl2 import CONFIG, tiles

UNUSED_POOLING_HEAD = 15_238_352


@pytest.mark.parametrize("config", [SINGLE, HYBRID])
def test_vision_flops_equal_a_counter(config: VLConfig) -> None:
    model = VL(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode_pictures(torch.rand(2, 3, config.image_size, config.image_size))
    assert cost.vision_flops(config, pictures=2) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_language_flops_equal_a_counter_but_for_the_masked_half() -> None:
    model = VL(SINGLE)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.head(model.hidden(torch.rand(1, 9, 24)))
    full = cost.language_flops(SINGLE.language, tokens=9, heads_out=9)
    attention = 2 * 2 * SINGLE.language.layers * 24
    assert full + attention * (81 - 45) == counter.get_total_flops()


def test_one_token_at_a_time_costs_what_all_at_once_cost() -> None:
    whole = cost.language_flops(SINGLE.language, tokens=6, heads_out=6)
    assert sum(cost.language_flops(SINGLE.language, tokens=1, past=t) for t in range(6)) == whole


def test_parameters_add_up() -> None:
    parts = cost.parameters(HYBRID)
    assert set(parts) == {"vision", "adaptor", "language"}
    assert sum(parts.values()) == sum(p.numel() for p in VL(HYBRID).parameters())


def test_cache_bytes_of_the_published_sizes() -> None:
    small = replace(SINGLE.language, width=2048, layers=24, heads=16, kv_heads=16)
    large = replace(SINGLE.language, width=4096, layers=30, heads=32, kv_heads=32)
    assert cost.cache_bytes_per_token(small) == 192 * 1024  # 2403.05525 family table: 192 KiB
    assert cost.cache_bytes_per_token(large) == 480 * 1024


@pytest.mark.parametrize(
    ("name", "total", "language", "active_millions"),
    [
        ("deepseek-vl2-tiny", 3_370_501_440, 2_934_734_080, 574),
        ("deepseek-vl2-small", 16_148_349_504, 15_706_484_224, 2451),
        ("deepseek-vl2", 27_480_134_248, 27_033_548_328, 4124),
    ],
)
def test_parameters_of_the_published_vl2_sizes(
    name: str, total: int, language: int, active_millions: int
) -> None:
    config = CHECKPOINTS[f"deepseek-ai/{name}"].model
    parts = cost.parameters(config)
    assert set(parts) == {"vision", "adaptor", "language", "marks"}
    assert sum(parts.values()) == total - UNUSED_POOLING_HEAD
    assert parts["language"] == language
    assert round(cost.active_parameters(config.language) / 1e6) == active_millions


@pytest.mark.parametrize(
    ("name", "size"),
    [("deepseek-vl2-tiny", 61_440), ("deepseek-vl2-small", 31_104), ("deepseek-vl2", 34_560)],
)
def test_cache_bytes_of_the_published_vl2_sizes(name: str, size: int) -> None:
    assert cost.cache_bytes_per_token(CHECKPOINTS[f"deepseek-ai/{name}"].model.language) == size


@pytest.mark.parametrize("change", [{}, {"depth": 3, "mlp_ratio": 2}, {"token_pooling": True}])
def test_vl2_vision_flops_equal_a_counter(change: dict[str, object]) -> None:
    config = replace(CONFIG, adaptor=replace(CONFIG.adaptor, **change))  # type: ignore[arg-type]
    model = VL2(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode_pictures(tiles(3), grids=[(2, 1)])
    assert cost.vision_flops(config, pictures=3) == counter.get_total_flops()


@pytest.mark.parametrize("config", [TINY, BASE, replace(BASE, moe=None), replace(TINY, dense_first=2)])
@pytest.mark.parametrize(("past", "new"), [(0, 9), (5, 4), (8, 1), (0, 1)])
def test_vl2_language_flops_equal_a_counter_but_for_the_masked_half(
    config: DeepseekV2Config, past: int, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")  # the counter does not know it
    model, cache = DeepseekV2(config), GrowingCache()
    if past:
        model(torch.rand(1, past, 32), cache=cache)
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)[None, None]
    padded = 0 if config.mla is None else config.mla.query_width - config.mla.value_width
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        positions = torch.arange(past, past + new)[None]
        model.lm_head(model(torch.rand(1, new, 32), positions=positions, mask=mask, cache=cache))
    pairs = new * past + new * (new + 1) // 2
    every = new * (past + new)
    if config.mla is None:
        pair = 2 * config.width
    elif new == 1:
        pair, padded = 0, 0
    else:
        pair = config.heads * (config.mla.query_width + config.mla.value_width)
    hidden = 2 * config.layers * (pair * (every - pairs) + padded * config.heads * every)
    found = cost.language_flops(config, tokens=new, past=past, heads_out=new)
    assert found + hidden == counter.get_total_flops()


def test_more_rows_read_more_experts() -> None:
    language = VL2_TINY.model.language
    assert cost.step_parameters(language) == pytest.approx(cost.active_parameters(language))
    expert = 3 * 896 * 1280 * 11
    two = cost.step_parameters(language, rows=2) - cost.step_parameters(language)
    assert two == pytest.approx(expert * 6 * (64 - 6) / 64)
    most = cost.step_parameters(language, rows=100_000) - cost.step_parameters(language)
    assert most == pytest.approx(expert * (64 - 6))
