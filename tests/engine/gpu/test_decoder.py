"""The step that is recorded, beside the step of torch: token by token, with rows that join and leave."""

import contextlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import seekvl
from seekvl.engine.budget import choose_limits
from seekvl.engine.cache import KVCache
from seekvl.engine.engine import Engine
from seekvl.engine.forward import prefill, step
from seekvl.engine.gpu.decoder import BUCKETS, StaticDecoder, bucket_of, roomy, static_decoder
from seekvl.engine.gpu.layers import accelerate_on_gpu
from seekvl.engine.gpu.switch import SWITCH
from seekvl.engine.request import Completion, SamplingParams
from seekvl.engine.runner import Runner
from seekvl.engine.scheduler import Plan
from seekvl.models import moe
from seekvl.models.llama import Mlp
from seekvl.models.vl2 import on_meta
from seekvl.presets import CHECKPOINTS
from seekvl.runtime import SeekVLError
from tests.engine.gpu.conftest import Place

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = ("seekvl-nano", "seekvl-nano-moe", "vl1-siglip", "vl2-tiny-like", "vl2-small-like", "vl2-base-like")
SLOTS = (0, 2, 3, 5, 7)


def load(name: str, device: str = "cpu") -> seekvl.VLM:
    folder = GOLDEN / name
    return seekvl.load(folder if folder.exists() else name, device=device, dtype="float32")


@cache
def reference(name: str) -> seekvl.VLM:
    return load(name)


@cache
def asked(name: str, place: Place) -> tuple[seekvl.VLM, StaticDecoder]:
    """A model at a place with what decodes there."""
    vlm = load(name, place.device)
    accelerate_on_gpu(vlm.model, place.level)
    decoder = static_decoder(vlm.model, place.level)
    assert decoder is not None
    return vlm, decoder


def filled(vlm: seekvl.VLM, *, rows: int = 8, slots: Sequence[int] = SLOTS) -> KVCache:
    """A cache with prompts of different lengths in some slots."""
    held = KVCache(vlm.model.config.language, rows=rows, device=vlm.device, dtype=vlm.dtype)
    for number, slot in enumerate(slots):
        prefill(vlm.model, vlm.processor("Say it. " * (number + 1)), cache=held, row=slot)
    held.reserve(held.capacity + 8)
    return held


def contents(held: KVCache, *, but: Sequence[int] = ()) -> list[Tensor]:
    """All that lies in the slots, on the CPU, but for some of them."""
    rows = [row for row in range(held.rows) if row not in but]
    return [buffer[rows].cpu() for side in held.buffers for buffer in side]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_rows_that_join_and_leave_equal_those_of_torch(name: str, place: Place) -> None:
    plain, (vlm, decoder) = reference(name), asked(name, place)
    expected, found = filled(plain), filled(vlm)
    tokens = dict(zip(SLOTS, (5, 6, 7, 8, 9), strict=True))
    for slots in ([0, 2, 3], [7], [7, 5, 3, 2, 0], [2, 3], [3], [0, 7, 2, 3]):
        fed = [tokens[slot] for slot in slots]
        wanted = step(plain.model, fed, cache=expected, slots=slots)
        logits = decoder.step(fed, cache=found, slots=slots).cpu()
        assert (logits - wanted).abs().max() < place.atol
        assert logits.argmax(-1).tolist() == wanted.argmax(-1).tolist()
        assert found.lengths == expected.lengths
        tokens |= dict(zip(slots, wanted.argmax(-1).tolist(), strict=True))


@pytest.mark.parametrize("name", ["seekvl-nano-moe", "vl2-small-like"])
def test_rows_beyond_the_answers_touch_nothing(name: str, place: Place) -> None:
    """Three answers in a bucket of four, beside slots that hold beginnings of prompts."""
    vlm, decoder = asked(name, place)
    held = filled(vlm)
    before, lengths = contents(held, but=[2, 3, 5]), list(held.lengths)
    logits = decoder.step([5, 6, 7], cache=held, slots=[3, 2, 5])
    assert equal(contents(held, but=[2, 3, 5]), before)
    for slot in (2, 3, 5):
        fresh = filled(vlm)
        row = [3, 2, 5].index(slot)
        alone = decoder.step([5 + row], cache=fresh, slots=[slot])
        assert (alone[0] - logits[row]).abs().max() < place.atol
        for mine, theirs in zip(contents(held), contents(fresh), strict=True):
            old = lengths[slot]
            assert torch.equal(mine[slot, :, :old], theirs[slot, :, :old])
            assert torch.allclose(mine[slot, :, old], theirs[slot, :, old], atol=place.atol)


def test_every_bucket_and_more_rows_than_the_largest(place: Place) -> None:
    plain, (vlm, decoder) = reference("vl2-small-like"), asked("vl2-small-like", place)
    for rows in (*BUCKETS, 67):
        slots = list(range(rows))
        tokens = [5 + slot % 50 for slot in slots]
        wanted = step(plain.model, tokens, cache=filled(plain, rows=rows, slots=[0]), slots=slots)
        found = decoder.step(tokens, cache=filled(vlm, rows=rows, slots=[0]), slots=slots)
        assert (found.cpu() - wanted).abs().max() < place.atol


@pytest.fixture
def _meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without numbers know no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)


@pytest.mark.usefixtures("_meta")
@pytest.mark.parametrize("preset", sorted(CHECKPOINTS))
def test_a_step_asks_the_device_for_nothing(preset: str) -> None:
    """At the true dimensions, on tensors without numbers: whoever asks for one fails."""
    model = on_meta(CHECKPOINTS[preset].model).to(torch.bfloat16)
    held = KVCache(model.config.language, rows=16, device=torch.device("meta"), dtype=torch.bfloat16)
    held.reserve(256)
    for rows in (1, 16):
        fed = torch.zeros(3, rows, dtype=torch.int64, device="meta")
        with torch.inference_mode():
            logits = StaticDecoder(model, level="eager")._run(fed, held)
        assert logits.shape == (rows, model.config.language.vocab_size)
        assert logits.device.type == "meta"


@pytest.mark.usefixtures("_meta")
def test_what_asks_the_device_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(CHECKPOINTS["deepseek-ai/deepseek-vl2-tiny"].model).to(torch.bfloat16)
    held = KVCache(model.config.language, rows=16, device=torch.device("meta"), dtype=torch.bfloat16)
    held.reserve(256)
    monkeypatch.setattr(moe, "_by_group", moe._by_loop)  # which wants to know how many tokens an expert got
    with torch.inference_mode(), pytest.raises(RuntimeError, match="meta"):
        StaticDecoder(model, level="eager")._run(torch.zeros(3, 16, dtype=torch.int64, device="meta"), held)


def test_what_is_fed_lies_as_kernels_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, decoder = reference("vl1-siglip"), StaticDecoder(reference("vl1-siglip").model, level="eager")
    seen: list[Tensor] = []
    whole = decoder._run

    def spy(fed: Tensor, held: KVCache) -> Tensor:
        seen.append(fed)
        return whole(fed, held)

    monkeypatch.setattr(decoder, "_run", spy)
    held = filled(vlm)
    decoder.step([5, 6, 7], cache=held, slots=[7, 0, 3])
    assert seen[0].tolist() == [[5, 6, 7, 5], [7, 0, 3, 7], [held.lengths[slot] - 1 for slot in (7, 0, 3, 7)]]
    assert all(row.is_contiguous() for row in seen[0].unbind())


def test_whom_a_step_refuses() -> None:
    vlm, decoder = reference("vl1-siglip"), StaticDecoder(reference("vl1-siglip").model, level="eager")
    held = filled(vlm)
    for tokens, slots in (([], []), ([1, 2], [3, 3]), ([1], [2, 3])):
        with pytest.raises(SeekVLError, match="one token for each of some slots"):
            decoder.step(tokens, cache=held, slots=slots)
    held.resize(rows=8, capacity=held.lengths[0])
    with pytest.raises(SeekVLError, match="the cache has room for"):
        decoder.step([1], cache=held, slots=[0])


def test_networks_that_compute_otherwise_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Mlp):
        """Somebody else's."""

    model = load("vl1-siglip").model
    assert static_decoder(model, "eager") is not None
    assert static_decoder(model) is None
    hook = model.language.layers[0].register_forward_hook(lambda *_: None)
    assert static_decoder(model, "eager") is None
    hook.remove()
    monkeypatch.setattr(model.language.layers[1].mlp, "__class__", Other)
    assert static_decoder(model, "eager") is None


def answers(vlm: seekvl.VLM, *, rows: int) -> tuple[list[Completion], Engine]:
    """Answers of different lengths to prompts of different lengths, more of them than rows."""
    engine = Engine(
        vlm.model, vlm.tokenizer, limits=choose_limits(vlm.model, rows=rows, exact=False, chunk=64)
    )
    picture = str(GOLDEN / "images" / "grad_224x160.png")
    conversations = [
        [{"role": "user", "content": "Say it. " * (1 + n % 3), "images": [picture] * (n % 2)}]
        for n in range(7)
    ]
    requests = [
        vlm.prepare(one, SamplingParams(max_new_tokens=3 + 2 * n)) for n, one in enumerate(conversations)
    ]
    done = {index: piece.completion for index, piece in engine.answer(requests) if piece.completion}
    return [done[index] for index in range(len(requests))], engine


@pytest.mark.parametrize("name", ["seekvl-nano", "vl2-small-like"])
def test_an_engine_answers_as_without(name: str, fast: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = answers(reference(name), rows=3)
    monkeypatch.setenv(SWITCH, fast.level)
    vlm = load(name, fast.device)
    assert vlm.kernels == fast.level
    found, engine = answers(vlm, rows=3)
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert engine._runner._static is not None
    assert engine._runner.cache.rows == bucket_of(3)


def test_weights_that_are_exchanged_are_seen(fast: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, fast.level)
    vlm = load("vl1-siglip", fast.device)
    first = vlm.chat("Say it.", max_new_tokens=4)
    with torch.inference_mode(mode=False), torch.no_grad():
        vlm.model.language.lm_head.weight = nn.Parameter(vlm.model.language.lm_head.weight.flip(0))
    monkeypatch.setenv(SWITCH, "off")
    plain = load("vl1-siglip")
    with torch.inference_mode(mode=False), torch.no_grad():
        plain.model.language.lm_head.weight = nn.Parameter(plain.model.language.lm_head.weight.flip(0))
    wanted = plain.chat("Say it.", max_new_tokens=4)
    monkeypatch.setenv(SWITCH, fast.level)
    found = vlm.chat("Say it.", max_new_tokens=4)
    assert found.token_ids == wanted.token_ids != first.token_ids


def test_exact_rows_are_taken_one_by_one(fast: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, fast.level)
    vlm = load("vl1-siglip", fast.device)
    runner = Runner(vlm.model, exact=True)
    runner.cache = filled(vlm)
    held = dict(enumerate(runner.cache.lengths))
    together = runner.decode([0, 2, 3], [5, 6, 7], held={slot: held[slot] for slot in (0, 2, 3)})
    single = [runner.decode([slot], [5 + row], held={slot: held[slot]}) for row, slot in enumerate((0, 2, 3))]
    assert torch.equal(together, torch.cat(single))
    assert runner.spare(1) == 0
    guessed = runner.decode([2, 2], [6, 9], held={2: held[2]})
    assert torch.allclose(guessed[0], single[1][0], atol=fast.atol)


def test_a_cache_is_made_larger_than_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "eager")
    model = reference("vl1-siglip").model
    runner = Runner(model, exact=False, tokens=8192)

    def shape(rows: int, capacity: int) -> tuple[int, int]:
        runner.prepare(Plan(rows=rows, capacity=capacity, placement=None, work=None, decode=()))
        return runner.cache.rows, runner.cache.capacity

    longest = model.config.language.max_positions
    assert shape(3, 256) == (4, 1024)
    assert shape(3, 1025) == (4, min(2048, longest))
    assert shape(9, 1000) == (9, 1000), "rounded up, 16 rows of 1,024 would exceed 8,192 tokens"
    assert roomy(65, 300, longest=4096, tokens=None) == (128, 1024)
