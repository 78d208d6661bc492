from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import seekvl
from seekvl.engine.generate import embed_prompt, generate
from seekvl.engine.prefix import Prefix, picture_digests, picture_places
from seekvl.engine.request import Completion, Piece, Request
from seekvl.processing.encode import ModelInput
from seekvl.runtime import SeekVLError

Make = Callable[..., Request]
Finish = Callable[[list[tuple[int, Piece]]], list[Completion]]
IMAGES = Path(__file__).parents[1] / "golden" / "images"


def conversation(vlm: seekvl.VLM, *questions: str, picture: str = "grad_224x160") -> ModelInput:
    """Questions with the answer "Yes." between them; the first shows a picture."""
    messages: list[dict[str, object]] = []
    for index, question in enumerate(questions):
        pictures = [] if index else [str(IMAGES / f"{picture}.png")]
        messages.append({"role": "user", "content": question, "images": pictures})
        messages.append({"role": "assistant", "content": "Yes."})
    return vlm.processor(messages[:-1])


def answer(
    vlm: seekvl.VLM,
    request: Request,
    finish: Finish,
    *,
    prefix: Prefix | None = None,
    chunk: int | None = None,
) -> Completion:
    return finish(list(generate(vlm.model, vlm.tokenizer, requests=[request], prefix=prefix, chunk=chunk)))[0]


@pytest.mark.parametrize("chunk", [None, 5])
def test_later_turns_equal_fresh_runs_and_compute_only_what_is_new(
    vlm: seekvl.VLM, make: Make, finish: Finish, chunk: int | None
) -> None:
    prefix = Prefix(vlm.model)
    questions: tuple[str, ...] = ()
    before = 0
    for question in ("Is it red?", "Is it blue?", "Why?"):
        questions = (*questions, question)
        request = make(conversation(vlm, *questions), max_new_tokens=8)
        kept = answer(vlm, request, finish, prefix=prefix, chunk=chunk)
        fresh = answer(vlm, request, finish)
        assert kept.token_ids == fresh.token_ids
        assert kept.usage.cached_tokens >= before
        assert (kept.timings.vision == 0) == (before > 0)
        before = kept.usage.prompt_tokens
    assert prefix.cache.lengths[0] == before + 7


def test_the_same_prompt_again_computes_one_token(vlm: seekvl.VLM, make: Make, finish: Finish) -> None:
    prefix = Prefix(vlm.model)
    request = make(conversation(vlm, "Is it red?"), max_new_tokens=6)
    first, second = (answer(vlm, request, finish, prefix=prefix) for _ in range(2))
    assert first.token_ids == second.token_ids
    assert second.usage.cached_tokens == second.usage.prompt_tokens - 1


def test_another_picture_is_not_taken_for_the_old_one(vlm: seekvl.VLM, make: Make, finish: Finish) -> None:
    prefix = Prefix(vlm.model)
    answer(vlm, make(conversation(vlm, "Is it red?"), max_new_tokens=4), finish, prefix=prefix)
    other = make(conversation(vlm, "Is it red?", picture="square_384x384"), max_new_tokens=6)
    kept = answer(vlm, other, finish, prefix=prefix)
    assert kept.token_ids == answer(vlm, other, finish).token_ids
    assert kept.usage.cached_tokens == int(other.inputs.image_mask.nonzero()[0])


def test_a_cut_inside_a_picture_goes_back_to_its_start(vlm: seekvl.VLM) -> None:
    inputs = conversation(vlm, "Is it red?")
    start = int(inputs.image_mask.nonzero()[0])
    prefix = Prefix(vlm.model)
    prefix.reuse(inputs)
    prefix.cache.lengths[0] = start + 10  # as after an interrupted prefill in chunks
    assert prefix.reuse(inputs) == start


def test_a_changed_word_keeps_what_stands_before_it(vlm: seekvl.VLM, make: Make, finish: Finish) -> None:
    prefix = Prefix(vlm.model)
    answer(vlm, make(conversation(vlm, "Is it red?"), max_new_tokens=4), finish, prefix=prefix)
    request = make(conversation(vlm, "Was it red?"), max_new_tokens=6)
    kept = answer(vlm, request, finish, prefix=prefix)
    assert kept.token_ids == answer(vlm, request, finish).token_ids
    assert 36 < kept.usage.cached_tokens < kept.usage.prompt_tokens - 1
    assert kept.timings.vision == 0


def test_closing_midway_leaves_a_cache_that_can_be_used(vlm: seekvl.VLM, make: Make, finish: Finish) -> None:
    prefix = Prefix(vlm.model)
    request = make(conversation(vlm, "Is it red?"), max_new_tokens=9)
    pieces = generate(vlm.model, vlm.tokenizer, requests=[request], prefix=prefix)
    for _ in range(4):
        next(pieces)
    pieces.close()
    again = answer(vlm, request, finish, prefix=prefix)
    assert again.token_ids == answer(vlm, request, finish).token_ids
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1


def test_an_interrupt_inside_a_forward_leaves_a_cache_that_can_be_used(
    vlm: seekvl.VLM, make: Make, finish: Finish
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    prefix = Prefix(vlm.model)
    request = make(conversation(vlm, "Is it red?"), max_new_tokens=9)
    pieces = generate(vlm.model, vlm.tokenizer, requests=[request], prefix=prefix)
    for _ in range(3):
        next(pieces)
    hook = vlm.model.language.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    hook.remove()
    longer = make(conversation(vlm, "Is it red?", "And now?"), max_new_tokens=6)
    assert answer(vlm, longer, finish, prefix=prefix).token_ids == answer(vlm, longer, finish).token_ids


def test_clear_forgets_the_conversation(vlm: seekvl.VLM, make: Make, finish: Finish) -> None:
    prefix = Prefix(vlm.model)
    request = make(conversation(vlm, "Is it red?"), max_new_tokens=3)
    answer(vlm, request, finish, prefix=prefix)
    prefix.clear()
    assert answer(vlm, request, finish, prefix=prefix).usage.cached_tokens == 0


def test_one_conversation_at_a_time(vlm: seekvl.VLM, make: Make) -> None:
    request = make(conversation(vlm, "Is it red?"))
    with pytest.raises(SeekVLError, match="1 request at a time, not 2"):
        generate(vlm.model, vlm.tokenizer, requests=[request, request], prefix=Prefix(vlm.model))


def test_low_pictures_count_as_part_of_a_picture(vlm: seekvl.VLM) -> None:
    inputs = conversation(vlm, "Is it red?")
    with_low = [replace(inputs, low_pixels=torch.full((1, 3, 4, 4), value)) for value in (0.0, 1.0)]
    prefix = Prefix(vlm.model)
    prefix.reuse(with_low[0])
    prefix.cache.lengths[0] = len(inputs.input_ids)
    assert prefix.reuse(with_low[1]) == int(inputs.image_mask.nonzero()[0])


def tiled_conversation(tiled: seekvl.VLM, *questions: str, names: tuple[str, ...]) -> ModelInput:
    messages: list[dict[str, object]] = []
    for index, question in enumerate(questions):
        pictures = [] if index else [str(IMAGES / f"{name}.png") for name in names]
        messages.append({"role": "user", "content": question, "images": pictures})
        messages.append({"role": "assistant", "content": "Yes."})
    return tiled.processor(messages[:-1])


def test_tiled_pictures_of_different_grids_stay_in_the_cache(
    tiled: seekvl.VLM, make: Make, finish: Finish
) -> None:
    names = ("text_320x200", "la_90x61")
    prefix, before = Prefix(tiled.model), 0
    for questions in (("Which?",), ("Which?", "Why?"), ("Which?", "Why?", "How?")):
        inputs = tiled_conversation(tiled, *questions, names=names)
        assert len(set(inputs.bill.image_tokens)) == 2
        request = make(inputs, max_new_tokens=6)
        kept = answer(tiled, request, finish, prefix=prefix)
        assert kept.token_ids == answer(tiled, request, finish).token_ids
        assert kept.usage.cached_tokens >= before
        assert (kept.timings.vision == 0) == (before > 0)
        before = kept.usage.prompt_tokens
    other = make(tiled_conversation(tiled, "Which?", names=(names[0], "gray_128x96")), max_new_tokens=6)
    kept = answer(tiled, other, finish, prefix=prefix)
    assert kept.token_ids == answer(tiled, other, finish).token_ids
    assert kept.usage.cached_tokens == picture_places(other.inputs)[1][0]


def test_a_cut_inside_the_second_tiled_picture_keeps_the_first(tiled: seekvl.VLM) -> None:
    inputs = tiled_conversation(tiled, "Which?", names=("text_320x200", "la_90x61"))
    places = picture_places(inputs)
    assert [end - start for start, end in places] == list(inputs.bill.image_tokens)
    assert inputs.image_mask[places[1][0] : places[1][1]].all()
    prefix = Prefix(tiled.model)
    prefix.reuse(inputs)
    prefix.cache.lengths[0] = places[1][1] - 1
    assert prefix.reuse(inputs) == places[1][0]
    embeds = embed_prompt(tiled.model, inputs)
    assert torch.equal(embed_prompt(tiled.model, inputs, start=places[1][0]), embeds[:, places[1][0] :])


def test_a_grid_is_part_of_a_picture(tiled: seekvl.VLM) -> None:
    inputs = tiled_conversation(tiled, "Which?", names=("la_90x61",))
    assert inputs.grids == ((2, 1),)
    other = replace(inputs, grids=((1, 2),))
    assert picture_digests(inputs) != picture_digests(other)
    assert picture_digests(inputs) == picture_digests(replace(inputs))
