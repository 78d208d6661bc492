import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import seekvl
from seekvl.engine.cache import KVCache
from seekvl.engine.forward import append, embed_prompt, exact_cuts, feed, follow, prefill, step
from seekvl.engine.kernels.accelerate import MOST_ROWS, accelerate
from seekvl.models.quantized import KINDS
from seekvl.processing.encode import ModelInput
from seekvl.runtime import SeekVLError
from seekvl.weights import quantize
from seekvl.weights.quantize import quantize_model


def new_cache(vlm: seekvl.VLM, *, rows: int = 1) -> KVCache:
    return KVCache(vlm.model.config.language, rows=rows, device=vlm.device, dtype=vlm.dtype)


def test_steps_of_a_ragged_batch_equal_single_rows(vlm: seekvl.VLM, prompts: list[ModelInput]) -> None:
    together = new_cache(vlm, rows=3)
    for row, inputs in enumerate(prompts):
        prefill(vlm.model, inputs, cache=together, row=row)
    together.reserve(together.capacity + 2)
    logits = [step(vlm.model, tokens, cache=together, slots=[0, 1, 2]) for tokens in ([5, 6, 7], [8, 9, 10])]
    for row, inputs in enumerate(prompts):
        alone = new_cache(vlm)
        prefill(vlm.model, inputs, cache=alone, row=0)
        for number, token in enumerate((5 + row, 8 + row)):
            alone.reserve(alone.lengths[0] + 1)
            single = step(vlm.model, [token], cache=alone, slots=[0])
            assert torch.allclose(single[0], logits[number][row], atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_near_the_longest_sequence(dtype: str) -> None:
    """In pieces, as a whole and step by step: positions stay exact up to the last one, in half precision
    too.
    """
    folder = Path(__file__).parents[1] / "golden" / "vl2-small-like"
    vlm = seekvl.load(folder, device="cpu", dtype=dtype)
    inputs = vlm.processor("Which of the two images is brighter? " * 270)
    limit = vlm.model.config.language.max_positions
    ids = inputs.input_ids.repeat(2)[: limit - 4]
    assert len(ids) == limit - 4
    bill = replace(inputs.bill, total=len(ids), text_tokens=len(ids))
    inputs = replace(inputs, input_ids=ids, image_mask=torch.zeros(len(ids)).bool(), bill=bill)
    caches = [new_cache(vlm), new_cache(vlm)]
    whole = prefill(vlm.model, inputs, cache=caches[0], row=0)
    parts = prefill(vlm.model, inputs, cache=caches[1], row=0, chunk=700)
    exact = dtype == "float32"
    assert (whole - parts).abs().max() < (1e-4 if exact else 0.3)
    for cache in caches:
        cache.reserve(len(ids) + 1)
    stepped = [step(vlm.model, [7], cache=cache, slots=[0])[0] for cache in caches]
    longer = replace(
        inputs, input_ids=torch.cat((ids, torch.tensor([7]))), image_mask=torch.zeros(len(ids) + 1).bool()
    )
    again = prefill(vlm.model, longer, cache=new_cache(vlm), row=0)
    for logits in stepped:
        assert (logits - again).abs().max() < (1e-4 if exact else 0.3)


def test_where_a_prompt_is_cut_changes_no_bit_where_that_is_promised(
    tiled: seekvl.VLM, prompts: list[ModelInput]
) -> None:
    model = tiled.model
    inputs = tiled.processor("Which of the two images is brighter? " * 6)
    level = accelerate(model.language)
    try:
        assert exact_cuts(model) == (level in MOST_ROWS)
        caches = [new_cache(tiled) for _ in range(3)]
        whole = prefill(model, inputs, cache=caches[0], row=0)
        parts = prefill(model, inputs, cache=caches[1], row=0, chunk=7)
        embeds = embed_prompt(model, inputs)
        caches[2].reserve(embeds.shape[1])
        append(model, embeds[:, :-5], cache=caches[2], slot=0)
        fed = feed(model, embeds[:, -5:-1], cache=caches[2], slot=0)
        last = follow(model, embeds[:, -1:], cache=caches[2], slot=0)
        assert fed.shape == (1, 4, embeds.shape[2])
        assert [cache.lengths for cache in caches] == [[embeds.shape[1]]] * 3
        for logits in (parts, last):
            assert (
                torch.equal(logits, whole) if exact_cuts(model) else torch.allclose(logits, whole, atol=2e-5)
            )
        accelerate(model.language, level="off")
        assert not exact_cuts(model)
        assert torch.allclose(prefill(model, inputs, cache=new_cache(tiled), row=0), whole, atol=2e-5, rtol=0)
    finally:
        accelerate(model.language)


def test_prompts_of_quantised_networks_may_be_cut_anywhere(
    vlm: seekvl.VLM, prompts: list[ModelInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SMALLEST", 0)
    level = accelerate(vlm.model.language)
    for kind in KINDS:
        model = copy.deepcopy(vlm.model)
        quantize_model(model, kind)
        accelerate(model.language, level=level)
        assert exact_cuts(model) == (level in MOST_ROWS)
        caches = [new_cache(vlm), new_cache(vlm)]
        whole = prefill(model, prompts[0], cache=caches[0], row=0)
        parts = prefill(model, prompts[0], cache=caches[1], row=0, chunk=7)
        assert torch.equal(parts, whole) or not exact_cuts(model)


def test_a_prompt_needs_room_in_the_cache(vlm: seekvl.VLM, prompts: list[ModelInput]) -> None:
    cache, embeds = new_cache(vlm), embed_prompt(vlm.model, prompts[0])
    cache.reserve(10)
    capacity = cache.capacity
    longer = embeds[:, :1].expand(1, capacity + 1, -1)
    for into in (append, feed, follow):
        with pytest.raises(SeekVLError, match=f"room for {capacity} tokens a row, {capacity + 1} are needed"):
            into(vlm.model, longer, cache=cache, slot=0)
    assert cache.lengths == [0]
