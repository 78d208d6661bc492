from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import seekvl
from seekvl.engine import budget
from seekvl.engine.cache import KVCache
from seekvl.engine.forward import prefill
from seekvl.engine.generate import generate
from seekvl.engine.pictures import picture_places
from seekvl.engine.request import Completion, Piece, Request
from seekvl.models.vl import VL, VLConfig
from seekvl.models.vl2 import VL2
from seekvl.processing.encode import ModelInput
from seekvl.runtime import SeekVLError

Make = Callable[..., Request]
Finish = Callable[[list[tuple[int, Piece]]], list[Completion]]


def run(vlm: seekvl.VLM, *requests: Request, **arguments: Any) -> list[tuple[int, Piece]]:
    return list(generate(vlm.model, vlm.tokenizer, requests=requests, **arguments))


def new_cache(vlm: seekvl.VLM, *, rows: int = 1) -> KVCache:
    return KVCache(vlm.model.config.language, rows=rows, device=vlm.device, dtype=vlm.dtype)


def slow_greedy(vlm: seekvl.VLM, inputs: ModelInput, count: int) -> list[int]:
    """The obvious way: the whole sequence through the whole network for every token."""
    ids, mask, new = inputs.input_ids[None], inputs.image_mask[None], []
    for _ in range(count):
        with torch.inference_mode():
            logits = vlm.model(ids, image_mask=mask, pixels=inputs.pixels, normalized=inputs.normalized)
        new.append(int(logits[0, -1].argmax()))
        ids = torch.cat((ids, torch.tensor([[new[-1]]])), dim=1)
        mask = torch.cat((mask, torch.tensor([[False]])), dim=1)
    return new


def test_cached_generation_equals_recomputing_everything(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish
) -> None:
    for inputs in prompts:
        (done,) = finish(run(vlm, make(inputs, max_new_tokens=12)))
        assert list(done.token_ids) == slow_greedy(vlm, inputs, 12)
        assert done.finish_reason == "length"


@pytest.mark.parametrize("chunk", [1, 7, 64, 100_000])
def test_a_prompt_in_chunks_equals_the_whole(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish, chunk: int
) -> None:
    inputs = prompts[2]
    whole = prefill(vlm.model, inputs, cache=new_cache(vlm), row=0)
    parts = prefill(vlm.model, inputs, cache=new_cache(vlm), row=0, chunk=chunk)
    assert torch.allclose(whole, parts, atol=2e-5, rtol=0)
    ids = [
        finish(run(vlm, make(inputs, max_new_tokens=8), chunk=size))[0].token_ids for size in (None, chunk)
    ]
    assert ids[0] == ids[1]


def test_a_batch_equals_single_answers_also_when_rows_end_early(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish
) -> None:
    alone = [finish(run(vlm, make(inputs, max_new_tokens=14)))[0] for inputs in prompts]
    early = alone[1].token_ids[3]  # row 1 meets its end token first, row 0 its length, row 2 goes on
    requests = [
        make(prompts[0], max_new_tokens=6),
        make(prompts[1], max_new_tokens=14, end_id=early),
        make(prompts[2], max_new_tokens=14),
        make(prompts[0], max_new_tokens=1),
    ]
    together = finish(run(vlm, *requests))
    assert together[0].token_ids == alone[0].token_ids[:6]
    assert together[1].token_ids == alone[1].token_ids[: alone[1].token_ids.index(early)]
    assert together[2].token_ids == alone[2].token_ids
    assert together[3].token_ids == alone[0].token_ids[:1]
    assert [done.finish_reason for done in together] == ["length", "stop", "length", "length"]


def test_sampling_in_a_batch_equals_sampling_alone(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish
) -> None:
    requests = [make(inputs, max_new_tokens=10, temperature=0.8, top_k=50, seed=3) for inputs in prompts]
    together = finish(run(vlm, *requests))
    assert [done.token_ids for done in together] == [
        finish(run(vlm, request))[0].token_ids for request in requests
    ]


def test_seeds_repeat(vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish) -> None:
    def answer(seed: int | None) -> tuple[int, ...]:
        request = make(prompts[0], max_new_tokens=12, temperature=1.5, seed=seed)
        return finish(run(vlm, request))[0].token_ids

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)
    assert answer(None) != answer(None)


def test_stop_strings_end_the_text_and_keep_the_tokens(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish
) -> None:
    (free,) = finish(run(vlm, make(prompts[1], max_new_tokens=16)))
    start = next(i for i in range(4, len(free.text)) if free.text[i : i + 2].isascii())
    stop = free.text[start : start + 2]
    (done,) = finish(run(vlm, make(prompts[1], max_new_tokens=16, stop=("never", stop))))
    assert done.text == free.text[: free.text.index(stop)]
    assert done.finish_reason == "stop"
    assert done.token_ids == free.token_ids[: len(done.token_ids)]
    assert len(done.token_ids) < 16


def test_a_stop_string_in_the_very_last_token_is_a_stop(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish
) -> None:
    (free,) = finish(run(vlm, make(prompts[1], max_new_tokens=5)))
    (done,) = finish(run(vlm, make(prompts[1], max_new_tokens=5, stop=free.text[-1])))
    assert done.finish_reason == "stop"


def test_only_the_last_position_of_a_prompt_goes_through_the_head(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make
) -> None:
    shapes = []
    hook = vlm.model.language.lm_head.register_forward_hook(
        lambda _m, inputs, _o: shapes.append(inputs[0].shape)
    )
    run(vlm, make(prompts[2], max_new_tokens=3))
    hook.remove()
    assert [shape[:-1].numel() for shape in shapes] == [1, 1, 1]


def test_text_never_touches_the_vision_towers(vlm: seekvl.VLM, prompts: list[ModelInput], make: Make) -> None:
    calls: list[int] = []
    modules = (vlm.model.vision, vlm.model.adaptor)
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in modules]
    (*_, (_, last)) = run(vlm, make(prompts[0], max_new_tokens=2))
    assert calls == []
    run(vlm, make(prompts[2], max_new_tokens=2))
    assert len(calls) == 4  # tower and adaptor, for each of two pictures
    for hook in hooks:
        hook.remove()
    assert last.completion is not None
    assert last.completion.timings.vision == 0


def test_a_picture_shown_in_several_prompts_is_encoded_once(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish
) -> None:
    calls: list[int] = []
    alone = [finish(run(vlm, make(prompts[row], max_new_tokens=5)))[0].token_ids for row in (1, 2)]
    hook = vlm.model.vision.register_forward_hook(lambda *_: calls.append(1))
    together = finish(run(vlm, *[make(prompts[row], max_new_tokens=5) for row in (1, 2, 1, 2)]))
    hook.remove()
    assert len(calls) == 2
    assert [one.token_ids for one in together] == alone * 2


def test_usage_and_timings_are_counted(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish
) -> None:
    (done,) = finish(run(vlm, make(prompts[2], max_new_tokens=3)))
    assert done.usage.prompt_tokens == len(prompts[2].input_ids)
    assert (done.usage.image_tokens, done.usage.completion_tokens, done.usage.cached_tokens) == (72, 3, 0)
    assert min(done.timings.vision, done.timings.prefill, done.timings.decode) > 0


def test_cancelling_ends_every_answer(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish
) -> None:
    asked = iter([False] * 12)
    requests = [make(inputs, max_new_tokens=50) for inputs in prompts]
    done = finish(run(vlm, *requests, cancel=lambda: next(asked, True)))
    assert [one.finish_reason for one in done] == ["cancelled"] * 3
    lengths = [len(one.token_ids) for one in done]  # answers begin while later prompts are computed
    assert lengths == sorted(lengths, reverse=True)
    assert 12 >= lengths[0] > lengths[2] > 0


def test_cancelling_before_the_prompts_computes_nothing(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish
) -> None:
    hook = vlm.model.language.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    done = finish(run(vlm, *[make(inputs) for inputs in prompts], cancel=lambda: True))
    hook.remove()
    assert [(one.finish_reason, one.token_ids, one.text) for one in done] == [("cancelled", (), "")] * 3


def short_model(vlm: seekvl.VLM, limit: int) -> VL:
    """The same weights with a shorter longest sequence."""
    config = replace(vlm.model.config, language=replace(vlm.model.config.language, max_positions=limit))
    model = VL(VLConfig(vision=config.vision, adaptor=config.adaptor, language=config.language))
    model.load_state_dict(vlm.model.state_dict())
    return model.eval().requires_grad_(False)


def test_a_prompt_without_room_for_an_answer_is_refused(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make
) -> None:
    size = len(prompts[0].input_ids)
    for limit in (size, size - 1):
        with pytest.raises(SeekVLError, match=rf"takes {size} tokens .* longest sequence is {limit}:"):
            generate(short_model(vlm, limit), vlm.tokenizer, requests=[make(prompts[0])])


def test_an_answer_ends_at_the_longest_sequence(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, finish: Finish
) -> None:
    (free,) = finish(run(vlm, make(prompts[0], max_new_tokens=4)))
    model = short_model(vlm, len(prompts[0].input_ids) + 3)
    (done,) = finish(list(generate(model, vlm.tokenizer, requests=[make(prompts[0], max_new_tokens=99)])))
    assert (done.finish_reason, done.token_ids) == ("length", free.token_ids[:3])


@pytest.mark.parametrize("chunk", [0, -3])
def test_an_impossible_chunk_is_refused(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, chunk: int
) -> None:
    with pytest.raises(SeekVLError, match=f"not {chunk}"):
        run(vlm, make(prompts[0]), chunk=chunk)


def test_no_requests_no_pieces(vlm: seekvl.VLM) -> None:
    assert run(vlm) == []


def test_weights_that_are_not_finite_stop_the_answer(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make
) -> None:
    model = short_model(vlm, 4096)
    model.language.norm.weight[0] = float("nan")
    with pytest.raises(SeekVLError, match="not finite"):
        list(generate(model, vlm.tokenizer, requests=[make(prompts[0])]))


IMAGES = Path(__file__).parents[1] / "golden" / "images"


def tiled_prompts(tiled: seekvl.VLM) -> list[ModelInput]:
    """A text, a picture of one tile beside one of many, and one of many alone."""

    def shown(*names: str) -> ModelInput:
        pictures = [str(IMAGES / f"{name}.png") for name in names]
        return tiled.processor([{"role": "user", "content": "What is it?", "images": pictures}])

    return [tiled.processor("Hello"), shown("tiny_5x3", "wide_1024x300"), shown("wide_1024x300")]


def slow_tiled(tiled: seekvl.VLM, inputs: ModelInput, count: int) -> list[int]:
    """The whole sequence through the whole network for every token."""
    assert isinstance(tiled.model, VL2)
    ids, mask, new = inputs.input_ids[None], inputs.image_mask[None], []
    for _ in range(count):
        with torch.inference_mode():
            logits = tiled.model(ids, image_mask=mask, pixels=inputs.pixels, grids=inputs.grids)
        new.append(int(logits[0, -1].argmax()))
        ids = torch.cat((ids, torch.tensor([[new[-1]]])), dim=1)
        mask = torch.cat((mask, torch.tensor([[False]])), dim=1)
    return new


def test_experts_and_latent_cached_and_together_equal_recomputing_everything(
    tiled: seekvl.VLM, make: Make, finish: Finish
) -> None:
    prompts = tiled_prompts(tiled)
    together = finish(run(tiled, *[make(inputs, max_new_tokens=6) for inputs in prompts]))
    for inputs, done in zip(prompts, together, strict=True):
        assert list(done.token_ids) == slow_tiled(tiled, inputs, 6)


def test_pieces_chosen_for_little_memory_give_the_same_answer(
    tiled: seekvl.VLM, make: Make, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, calls = tiled_prompts(tiled)[2], {"tower": [], "prompt": []}
    assert inputs.pixels is not None
    hooks = [
        tiled.model.vision.register_forward_pre_hook(lambda _, x: calls["tower"].append(len(x[0]))),
        tiled.model.language.register_forward_pre_hook(lambda _, x: calls["prompt"].append(x[0].shape[1])),
    ]
    (whole,) = finish(run(tiled, make(inputs, max_new_tokens=6)))
    assert calls["tower"] == [len(inputs.pixels)]
    (place,) = picture_places(inputs)
    assert calls["prompt"] == [place[1], len(inputs.input_ids) - place[1], *[1] * 5]
    for sizes in calls.values():
        sizes.clear()
    monkeypatch.setattr(budget, "free_bytes", lambda _: 0)
    (pieces,) = finish(run(tiled, make(inputs, max_new_tokens=6)))
    for hook in hooks:
        hook.remove()
    assert calls["tower"] == [1] * len(inputs.pixels)
    assert calls["prompt"] == [64, place[1] - 64, len(inputs.input_ids) - place[1], *[1] * 5]
    assert pieces.token_ids == whole.token_ids


def test_text_never_touches_the_tower_of_tiles(tiled: seekvl.VLM, make: Make) -> None:
    calls: list[int] = []
    hook = tiled.model.vision.register_forward_hook(lambda *_: calls.append(1))
    run(tiled, make(tiled_prompts(tiled)[0], max_new_tokens=2))
    assert calls == []
    run(tiled, *[make(inputs, max_new_tokens=2) for inputs in tiled_prompts(tiled)])
    hook.remove()
    assert len(calls) == 2  # the wide picture is shown twice and encoded once


def test_the_penalty_counts_the_prompt_where_it_is_told_to(
    tiled: seekvl.VLM, make: Make, finish: Finish
) -> None:
    inputs = tiled_prompts(tiled)[0]
    prompt = set(inputs.input_ids.tolist())
    never, always = (make(inputs, max_new_tokens=6, repetition_penalty=by) for by in (30.0, 0.01))
    plain, shunned, sought = finish(
        run(tiled, always, *[replace(one, penalise_prompt=True) for one in (never, always)])
    )
    assert not prompt & set(shunned.token_ids)
    assert sought.token_ids[0] in prompt
    assert plain.token_ids[0] not in prompt


def test_answers_can_be_held_to_boxes(tiled: seekvl.VLM, make: Make, finish: Finish) -> None:
    request = make(tiled_prompts(tiled)[2], max_new_tokens=60, constrain="box_first")
    (done,) = finish(run(tiled, request))
    assert done.text.startswith("<|ref|>")
    assert "<|/det|>" in done.text
