from dataclasses import replace
from pathlib import Path

import pytest
import torch

import seekvl
from seekvl.engine.cache import KVCache
from seekvl.engine.forward import prefill, step
from seekvl.processing.encode import ModelInput


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
