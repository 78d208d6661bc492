from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from seekvl.models import cost
from seekvl.models.vl import VL, VLConfig
from tests.models.test_vl import HYBRID, SINGLE


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
