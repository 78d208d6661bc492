from dataclasses import replace
from pathlib import Path

import pytest
import torch

import seekvl
from seekvl.engine import budget
from seekvl.engine.budget import (
    LEAST_TOKENS,
    MOST_TOKENS,
    choose_limits,
    free_bytes,
    prefill_tokens,
    tiles_at_once,
    tower_tiles,
)
from seekvl.engine.cache import token_bytes
from seekvl.engine.kernels.accelerate import MOST_ROWS, accelerate
from seekvl.models.vl2 import VL2Config
from seekvl.presets import CHECKPOINTS

GB = 10**9


def small() -> VL2Config:
    model = CHECKPOINTS["deepseek-ai/deepseek-vl2-small"].model
    assert isinstance(model, VL2Config)
    return model


def test_a_prompt_that_fits_goes_through_as_a_whole() -> None:
    assert prefill_tokens(small().language, total=4096, itemsize=2, free=16 * GB) == 4096


def test_less_memory_means_smaller_pieces() -> None:
    sizes = [prefill_tokens(small().language, total=4096, itemsize=2, free=n * GB) for n in (8, 4, 2, 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    assert all(LEAST_TOKENS <= size <= 4096 for size in sizes)
    one = small().language.heads * 4096 * budget.SCORE_BYTES
    assert sizes[-1] * one < GB / 2


def test_pieces_never_get_uselessly_small() -> None:
    assert prefill_tokens(small().language, total=4096, itemsize=2, free=0) == LEAST_TOKENS
    assert tower_tiles(small().vision, itemsize=2, free=0) == 1


def test_experts_count_in_the_estimate() -> None:
    language = small().language
    narrow = replace(language, moe=None, mlp_width=1)
    with_experts, without = (
        prefill_tokens(config, total=4096, itemsize=4, free=GB) for config in (language, narrow)
    )
    assert with_experts < without


def test_tiles_of_a_large_picture_fit_into_a_few_gigabytes() -> None:
    assert tower_tiles(small().vision, itemsize=2, free=8 * GB) >= 10
    assert 1 <= tower_tiles(small().vision, itemsize=4, free=GB) < 10


def test_this_machine_has_memory() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


def test_a_container_leaves_what_its_limit_says(tmp_path: Path) -> None:
    assert budget._container_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert budget._container_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 200000\n")
    assert budget._container_bytes(tmp_path) == 500_000


def test_the_tighter_of_machine_and_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_machine_bytes", lambda: 5 * GB)
    monkeypatch.setattr(budget, "_container_bytes", lambda: 2 * GB)
    assert free_bytes(torch.device("cpu")) == 2 * GB
    monkeypatch.setattr(budget, "_machine_bytes", lambda: None)
    monkeypatch.setattr(budget, "_container_bytes", lambda: None)
    assert free_bytes(torch.device("cpu")) == 2**30


def test_limits_follow_from_the_model_and_the_memory(
    vlm: seekvl.VLM, tiled: seekvl.VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda _: GB)
    limits = choose_limits(vlm.model)
    config = vlm.config.language
    assert limits.tokens == int(0.4 * GB) // token_bytes(config, itemsize=4)
    assert (limits.rows, limits.longest, limits.exact, limits.queue) == (8, config.max_positions, True, None)
    assert limits.guess > choose_limits(vlm.model, exact=False).guess == 0
    given = choose_limits(vlm.model, rows=3, cache_bytes=10**6, chunk=7, queue=4, exact=False, guess=2)
    assert (given.rows, given.chunk, given.queue, given.exact, given.guess) == (3, 7, 4, False, 2)
    assert given.tokens == 10**6 // token_bytes(config, itemsize=4)
    assert tiles_at_once(vlm.model) is None
    monkeypatch.setattr(budget, "free_bytes", lambda _: 0)
    level = accelerate(vlm.model.language)
    served = MOST_TOKENS if level in MOST_ROWS else LEAST_TOKENS  # whose kernels write no scores out
    assert (choose_limits(vlm.model).chunk, tiles_at_once(tiled.model)) == (served, 1)
    accelerate(vlm.model.language, level="off")
    try:
        assert choose_limits(vlm.model).chunk == LEAST_TOKENS
    finally:
        accelerate(vlm.model.language)


def test_a_little_more_memory_changes_no_piece(
    vlm: seekvl.VLM, tiled: seekvl.VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    accelerate(vlm.model.language, level="off")
    try:
        for free in range(1, 64):
            monkeypatch.setattr(budget, "free_bytes", lambda _, free=free: free * GB // 8)
            found.add((choose_limits(vlm.model).chunk, tiles_at_once(tiled.model)))
    finally:
        accelerate(vlm.model.language)
    assert len(found) <= 12
    assert {chunk for chunk, _ in found} <= {64, 128, 256, 512, MOST_TOKENS}
