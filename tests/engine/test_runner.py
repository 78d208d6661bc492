from pathlib import Path

import pytest
import torch

import seekvl
from seekvl.engine.cache import KVCache
from seekvl.engine.forward import exact_rows, prefill, step
from seekvl.engine.pictures import picture_digests, picture_places
from seekvl.engine.prompt import Shown, make_prompt
from seekvl.engine.runner import Runner, weights_mark
from seekvl.engine.scheduler import Job, Placement, Plan
from seekvl.processing.encode import ModelInput

GOLDEN = Path(__file__).parents[1] / "golden"


def plan(rows: int, capacity: int, placement: Placement | None = None) -> Plan:
    return Plan(rows=rows, capacity=capacity, placement=placement, work=None, decode=())


def fill(runner: Runner, inputs: ModelInput, *, slot: int, ends: list[int]) -> torch.Tensor:
    """Fill a slot with a prompt, in pieces that end there."""
    places, digests = picture_places(inputs), picture_digests(inputs)
    pictures = [Shown(*place, digest) for place, digest in zip(places, digests, strict=True)]
    features = {
        index: runner.encode(inputs, index=index, digest=shown.digest) for index, shown in enumerate(pictures)
    }
    start, logits = 0, None
    for end in ends:
        assert logits is None
        logits = runner.fill(inputs, slot=slot, start=start, end=end, pictures=pictures, features=features)
        start = end
    assert logits is not None
    return logits


@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_pieces_of_a_prompt_fill_any_slot(vlm: seekvl.VLM, prompts: list[ModelInput], pieces: int) -> None:
    inputs = prompts[2]
    total = len(inputs.input_ids)
    cache = KVCache(vlm.model.config.language, rows=1, device=vlm.device, dtype=vlm.dtype)
    whole = prefill(vlm.model, inputs, cache=cache, row=0)
    runner = Runner(vlm.model, exact=True)
    runner.prepare(plan(3, 512))
    ends = [total * (n + 1) // pieces for n in range(pieces)]
    assert torch.allclose(fill(runner, inputs, slot=2, ends=ends), whole, atol=2e-5, rtol=0)
    assert runner.cache.lengths == [0, 0, total]
    assert runner.features.queries == 2


@pytest.mark.parametrize("exact", [True, False])
def test_slots_with_gaps_are_fed_each_at_its_own_length(
    vlm: seekvl.VLM, prompts: list[ModelInput], exact: bool
) -> None:
    runner = Runner(vlm.model, exact=exact)
    runner.prepare(plan(5, 512))
    for slot, inputs in zip((1, 3, 4), prompts, strict=True):
        fill(runner, inputs, slot=slot, ends=[len(inputs.input_ids)])
    held = dict(enumerate(runner.cache.lengths))
    slots, tokens = [4, 1, 3], [5, 6, 7]
    together = runner.decode(slots, tokens, held={slot: held[slot] for slot in slots})
    for row, slot in enumerate(slots):
        cache = KVCache(vlm.model.config.language, rows=1, device=vlm.device, dtype=vlm.dtype)
        prefill(vlm.model, prompts[(1, 3, 4).index(slot)], cache=cache, row=0)
        cache.reserve(cache.lengths[0] + 1)
        alone = step(vlm.model, [tokens[row]], cache=cache, slots=[0])
        if exact:
            assert torch.equal(together[row], alone[0])
        assert torch.allclose(together[row], alone[0], atol=2e-5, rtol=0)
    assert runner.cache.lengths == [0, held[1] + 1, 0, held[3] + 1, held[4] + 1]


@pytest.mark.parametrize("exact", [True, False])
def test_several_tokens_of_a_slot_follow_each_other_and_can_be_taken_back(
    vlm: seekvl.VLM, prompts: list[ModelInput], exact: bool
) -> None:
    runner = Runner(vlm.model, exact=exact)
    runner.prepare(plan(2, 512))
    for slot in range(2):
        fill(runner, prompts[slot], slot=slot, ends=[len(prompts[slot].input_ids)])
    held = dict(enumerate(runner.cache.lengths))
    guessed = runner.decode([0, 1, 1, 1], [9, 5, 6, 7], held=held)
    again = runner.decode([1, 1], [5, 6], held={1: held[1]})  # the third was wrong
    single = [runner.decode([1], [token], held={1: held[1] + n})[0] for n, token in enumerate((5, 6, 8))]
    assert torch.allclose(guessed[1:3], again, atol=2e-5, rtol=0)
    assert torch.allclose(torch.stack(single[:2]), again, atol=2e-5, rtol=0)
    if exact:
        assert torch.equal(torch.stack(single[:2]), again)
    assert runner.cache.lengths == [held[0] + 1, held[1] + 3]


def test_a_job_begins_with_what_it_shares(vlm: seekvl.VLM, prompts: list[ModelInput]) -> None:
    runner = Runner(vlm.model, exact=True)
    runner.prepare(plan(1, 256))
    fill(runner, prompts[0], slot=0, ends=[len(prompts[0].input_ids)])
    job = Job(prompt=make_prompt([1], [], chunk=4), room=1)
    runner.prepare(plan(3, 512, Placement(job, 2, 0, 7)))
    assert runner.cache.lengths == [len(prompts[0].input_ids), 0, 7]
    keys, _ = runner.cache.buffers
    assert torch.equal(keys[1][2, :, :7], keys[1][0, :, :7])


def test_guesses_have_room_where_rows_are_exact_together(vlm: seekvl.VLM) -> None:
    exact, shared = Runner(vlm.model, exact=True), Runner(vlm.model, exact=False)
    most = exact_rows(vlm.model, exact.cache)
    assert [exact.spare(rows) for rows in (1, most, most + 1)] == [most - 1, 0, 0]
    assert shared.spare(1) > 0
    assert shared.spare(2) == 0


def test_weights_that_change_leave_a_mark() -> None:
    model = seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="float32").model
    marks = [weights_mark(model)]
    assert weights_mark(model) == marks[0]
    with torch.no_grad():
        model.adaptor.load_state_dict(model.adaptor.state_dict())
    marks.append(weights_mark(model))
    model.to(torch.bfloat16)
    marks.append(weights_mark(model))
    with torch.inference_mode():
        model.language.norm = torch.nn.Identity()
    marks.append(weights_mark(model))
    assert len(set(marks)) == 4
