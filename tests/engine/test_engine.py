"""Requests that come and go, alone and together; the same answers whatever else happens."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

import seekvl
from seekvl.engine.budget import choose_limits
from seekvl.engine.engine import Engine
from seekvl.engine.forward import exact_rows
from seekvl.engine.generate import generate
from seekvl.engine.handle import DeadlinePassed, EngineStopped, Handle
from seekvl.engine.pictures import picture_places
from seekvl.engine.request import Completion, Piece, Request
from seekvl.engine.runner import Runner
from seekvl.engine.scheduler import QueueFull
from seekvl.processing.encode import ModelInput
from seekvl.runtime import SeekVLError

Make = Callable[..., Request]
GOLDEN = Path(__file__).parents[1] / "golden"
IMAGES = GOLDEN / "images"


def new_engine(vlm: seekvl.VLM, **limits: Any) -> Engine:
    return Engine(vlm.model, vlm.tokenizer, limits=choose_limits(vlm.model, **limits))


def alone(vlm: seekvl.VLM, request: Request, *, chunk: int | None = None) -> Completion:
    """The answer of an engine that does nothing else."""
    *_, (_, last) = generate(vlm.model, vlm.tokenizer, requests=[request], chunk=chunk)
    assert last.completion is not None
    return last.completion


def conversation(
    vlm: seekvl.VLM, *questions: str, pictures: tuple[str, ...] = ("grad_224x160",)
) -> ModelInput:
    """Questions with the answer "Yes." between them; the first shows pictures."""
    messages: list[dict[str, object]] = []
    for index, question in enumerate(questions):
        shown = [] if index else [str(IMAGES / f"{name}.png") for name in pictures]
        messages.append({"role": "user", "content": question, "images": shown})
        messages.append({"role": "assistant", "content": "Yes."})
    return vlm.processor(messages[:-1])


def is_empty(engine: Engine) -> bool:
    """Whether nobody is under way, nothing waits, and no slot belongs to anyone."""
    metrics = engine.metrics()
    slots = engine._scheduler._slots
    return (metrics.waiting, metrics.running, len(engine._tasks)) == (0, 0, 0) and not any(
        slot.job for slot in slots
    )


@contextmanager
def logged() -> Iterator[list[bytes]]:
    """The bits of every row of logits that an engine computes, step by step."""
    rows: list[bytes] = []
    fill, decode = Runner.fill, Runner.decode

    def log(out: torch.Tensor | None) -> torch.Tensor | None:
        if out is not None:
            rows.extend(row.numpy().tobytes() for row in out.view(-1, out.shape[-1]))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "fill", lambda self, *args, **named: log(fill(self, *args, **named)))
        patch.setattr(Runner, "decode", lambda self, *args, **named: log(decode(self, *args, **named)))
        yield rows


@pytest.fixture(scope="module", params=["vl1-siglip", "vl2-small-like"])
def half(request: pytest.FixtureRequest) -> seekvl.VLM:
    return seekvl.load(GOLDEN / request.param, device="cpu", dtype="bfloat16", preprocessing="official")


def test_not_a_bit_of_an_answer_depends_on_the_others(half: seekvl.VLM, make: Make) -> None:
    """In bfloat16, with more rows than the kernels take, of different lengths, and with shared beginnings."""
    questions = [" ".join(["Is it red?"] * (1 + n % 4)) + " " * n for n in range(10)]
    prompts = [conversation(half, question) for question in questions]
    prompts += [conversation(half, "Why?", pictures=("la_90x61", "grad_224x160")), half.processor("Hello")]
    requests = [make(inputs, max_new_tokens=4 + n) for n, inputs in enumerate(prompts)]
    engine = new_engine(half, rows=12)
    with logged() as together:
        done = {i: piece.completion for i, piece in engine.answer(requests) if piece.completion is not None}
    assert engine.metrics().prefix_hits > 5
    for index, request in enumerate(requests):
        with logged() as single:
            expected = alone(half, request)
        assert done[index] is not None
        assert done[index].token_ids == expected.token_ids
        assert set(single) <= set(together)


def test_a_prefix_from_the_cache_has_the_bits_of_a_fresh_prompt(half: seekvl.VLM, make: Make) -> None:
    engine = new_engine(half, chunk=16)
    engine.submit(make(conversation(half, "Is it red?", pictures=("la_90x61",)), max_new_tokens=9)).result()
    for questions in (("Is it blue?",), ("Is it red?",), ("Is it red?", "Why?")):
        request = make(conversation(half, *questions, pictures=("la_90x61",)), max_new_tokens=7)
        with logged() as kept:
            found = engine.submit(request).result()
        with logged() as fresh:
            expected = new_engine(half, chunk=16).submit(request).result()
        assert kept == fresh
        assert found.token_ids == expected.token_ids
        assert found.usage.cached_tokens > found.usage.image_tokens
        assert found.timings.vision == 0


def test_rows_that_share_their_products_give_the_same_ids_in_float32(
    vlm: seekvl.VLM, tiled: seekvl.VLM, make: Make
) -> None:
    for model in (vlm, tiled):
        prompts = [conversation(model, "Is it red?" * n) for n in (1, 3, 2, 4)]
        requests = [make(inputs, max_new_tokens=5 * n) for n, inputs in enumerate(prompts, start=1)]
        engine = new_engine(model, exact=False, rows=3)
        done = {i: piece.completion for i, piece in engine.answer(requests) if piece.completion is not None}
        for index, request in enumerate(requests):
            assert done[index].token_ids == alone(model, request).token_ids


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.4, "top_k": 3, "seed": 5}, {"repetition_penalty": 0.05}],
)
def test_guesses_change_no_answer_and_save_steps(vlm: seekvl.VLM, make: Make, params: dict[str, Any]) -> None:
    """Random weights soon repeat themselves, which a penalty below 1 makes sure of."""
    request = make(vlm.processor("Say it again, again, again."), max_new_tokens=60, **params)
    plain = alone(vlm, request)
    engine = new_engine(vlm, exact=False, guess=4, rows=1)
    with logged() as rows:
        guessed = engine.submit(request).result()
    assert guessed.token_ids == plain.token_ids
    metrics = engine.metrics()
    assert len(rows) == 60 - metrics.right_tokens + metrics.guessed_tokens
    if "repetition_penalty" in params:
        assert metrics.right_tokens > 20


def test_where_steps_are_exact_a_guess_changes_no_bit(half: seekvl.VLM, make: Make) -> None:
    requests = [
        make(half.processor("Say it" + ", again" * n), max_new_tokens=30, repetition_penalty=0.05)
        for n in range(1, 5)
    ]
    found = []
    for guess in (0, 4):
        engine = new_engine(half, guess=guess, rows=4)
        with logged() as rows:
            pieces = list(engine.answer(requests))
        found.append(({index: p.completion.token_ids for index, p in pieces if p.completion}, set(rows)))
        spare = exact_rows(half.model, engine._runner.cache) > 4
        assert (engine.metrics().right_tokens > 0) == (spare and guess > 0)
    (plain, bits), (guessed, more_bits) = found
    assert guessed == plain
    assert bits <= more_bits


def test_an_end_inside_of_a_guess_ends_the_answer(vlm: seekvl.VLM, make: Make) -> None:
    inputs = vlm.processor("Say it again, again, again.")
    plain = alone(vlm, make(inputs, max_new_tokens=40, repetition_penalty=0.05))
    for size in range(30, 40):
        engine = new_engine(vlm, exact=False, guess=4, rows=1)
        done = engine.submit(make(inputs, max_new_tokens=size, repetition_penalty=0.05)).result()
        assert (done.token_ids, done.finish_reason) == (plain.token_ids[:size], "length")
    assert is_empty(engine)


def session_engine(vlm: seekvl.VLM, *, chunk: int | None = None) -> Engine:
    return new_engine(vlm, rows=1, exact=False, chunk=chunk)


@pytest.mark.parametrize("chunk", [None, 5])
def test_later_turns_equal_fresh_runs_and_compute_only_what_is_new(
    vlm: seekvl.VLM, make: Make, chunk: int | None
) -> None:
    engine = session_engine(vlm, chunk=chunk)
    questions: tuple[str, ...] = ()
    before = 0
    for question in ("Is it red?", "Is it blue?", "Why?"):
        questions = (*questions, question)
        request = make(conversation(vlm, *questions), max_new_tokens=8)
        kept = engine.submit(request).result()
        assert kept.token_ids == alone(vlm, request).token_ids
        assert kept.usage.cached_tokens >= before
        assert (kept.timings.vision == 0) == (before > 0)
        before = kept.usage.prompt_tokens
    assert engine._runner.cache.lengths[0] == before + 7
    again = engine.submit(request).result()
    assert again.usage.cached_tokens == before - 1


def test_another_picture_is_not_taken_for_the_old_one(vlm: seekvl.VLM, make: Make) -> None:
    engine = session_engine(vlm)
    engine.submit(make(conversation(vlm, "Is it red?"), max_new_tokens=4)).result()
    other = make(conversation(vlm, "Is it red?", pictures=("square_384x384",)), max_new_tokens=6)
    kept = engine.submit(other).result()
    assert kept.token_ids == alone(vlm, other).token_ids
    assert kept.usage.cached_tokens == int(other.inputs.image_mask.nonzero()[0])


def test_the_first_of_two_tiled_pictures_stays_when_the_second_changes(tiled: seekvl.VLM, make: Make) -> None:
    engine = session_engine(tiled)
    names = ("text_320x200", "la_90x61")
    engine.submit(make(conversation(tiled, "Which?", pictures=names), max_new_tokens=4)).result()
    inputs = conversation(tiled, "Which?", pictures=(names[0], "gray_128x96"))
    kept = engine.submit(make(inputs, max_new_tokens=6)).result()
    assert kept.token_ids == alone(tiled, make(inputs, max_new_tokens=6)).token_ids
    assert kept.usage.cached_tokens == picture_places(inputs)[1][0]


def test_cancelling_at_any_point_leaves_nothing_behind(vlm: seekvl.VLM, make: Make) -> None:
    request = make(conversation(vlm, "Is it red?"), max_new_tokens=4)
    expected = alone(vlm, request)
    engine = new_engine(vlm, chunk=16, rows=2)
    for steps in range(9):
        engine.forget()
        handle = engine.submit(request)
        other = engine.submit(make(vlm.processor("Hello"), max_new_tokens=9))
        for _ in range(steps):
            engine.step()
        handle.cancel()
        found = handle.result()
        assert found.finish_reason == "cancelled"
        assert found.token_ids == expected.token_ids[: len(found.token_ids)]
        assert len(found.token_ids) < 4
        other.cancel()
        assert is_empty(engine)
        assert engine.submit(request).result().token_ids == expected.token_ids
    assert engine.metrics().ended["cancelled"] == 18


def test_closing_midway_and_an_interrupt_leave_an_engine_that_can_be_used(
    vlm: seekvl.VLM, make: Make
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    request = make(conversation(vlm, "Is it red?"), max_new_tokens=9)
    for limits in ({}, {"exact": False, "rows": 1}):
        engine = new_engine(vlm, **limits)
        pieces = engine.answer([request])
        for _ in range(4):
            next(pieces)
        pieces.close()
        assert is_empty(engine)
        pieces = engine.answer([request])
        for _ in range(3):
            next(pieces)
        hook = vlm.model.language.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
        hook.remove()
        assert is_empty(engine)
        longer = make(conversation(vlm, "Is it red?", "And now?"), max_new_tokens=6)
        assert engine.submit(longer).result().token_ids == alone(vlm, longer).token_ids


def test_a_request_that_fails_takes_nobody_with_it(vlm: seekvl.VLM, make: Make) -> None:
    good = make(conversation(vlm, "Is it red?"), max_new_tokens=6)
    assert good.inputs.pixels is not None
    bad = replace(good, inputs=replace(good.inputs, pixels=torch.full_like(good.inputs.pixels, torch.nan)))
    for exact in (True, False):
        engine = new_engine(vlm, exact=exact, rows=2)
        handles = [engine.submit(request) for request in (good, bad, good, bad, good)]
        for handle in handles[1::2]:
            with pytest.raises(SeekVLError, match="not finite"):
                handle.result()
        assert {handle.result().token_ids for handle in handles[::2]} == {alone(vlm, good).token_ids}
        assert engine.metrics().ended == {"length": 3, "failed": 2}
        assert is_empty(engine)


def test_a_step_that_breaks_fails_its_answers_and_no_later_ones(vlm: seekvl.VLM, make: Make) -> None:
    engine = new_engine(vlm)
    request = make(vlm.processor("Hello"), max_new_tokens=6)
    handles = [engine.submit(request) for _ in range(2)]
    for _ in range(3):
        engine.step()

    def out_of_memory(*_: object) -> None:
        raise MemoryError("no room")

    hook = vlm.model.language.register_forward_hook(out_of_memory)
    engine.step()
    hook.remove()
    for handle in handles:
        with pytest.raises(MemoryError, match="no room"):
            handle.result()
    assert is_empty(engine)
    assert engine.submit(request).result().token_ids == alone(vlm, request).token_ids


def test_a_cache_that_cannot_grow_fails_who_runs_and_begins_anew(
    vlm: seekvl.VLM, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(vlm)
    request = make(vlm.processor("Hello"), max_new_tokens=6)
    handle = engine.submit(request)
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner.cache, "resize", lambda **_: (_ for _ in ()).throw(MemoryError("full")))
        engine.step()
    with pytest.raises(EngineStopped, match="full"):
        handle.result()
    assert is_empty(engine)
    assert engine.submit(request).result().token_ids == alone(vlm, request).token_ids


def test_the_queue_and_the_deadlines_are_kept(vlm: seekvl.VLM, make: Make) -> None:
    engine = new_engine(vlm, rows=1, queue=2)
    request = make(vlm.processor("Hello"), max_new_tokens=400, end_id=-1)
    running = engine.submit(request, deadline=0.15)
    for _ in range(4):
        engine.step()
    late, patient = (
        engine.submit(request, deadline=0.01),
        engine.submit(make(request.inputs, max_new_tokens=3)),
    )
    with pytest.raises(QueueFull, match="2 requests wait"):
        engine.submit(request)
    assert engine.metrics().waiting == 2
    time.sleep(0.16)
    assert len(patient.result().token_ids) == 3
    with pytest.raises(DeadlinePassed):
        late.result()
    ended = running.result()
    assert ended.finish_reason == "cancelled"
    assert 0 < len(ended.token_ids) < 400
    assert engine.metrics().ended == {"overdue": 1, "cancelled": 1, "length": 1}
    for deadline in (0.0, -1.0, float("nan")):
        with pytest.raises(SeekVLError, match="deadline must be above 0"):
            engine.submit(request, deadline=deadline)


def test_a_prompt_without_room_is_refused_when_it_is_submitted(vlm: seekvl.VLM, make: Make) -> None:
    inputs = vlm.processor("Hello")
    ids = inputs.input_ids.repeat(20_000)[:16_384]
    long = replace(inputs, input_ids=ids, image_mask=torch.zeros(len(ids)).bool())
    engine = new_engine(vlm)
    for call in (engine.submit, lambda request: engine.answer([request])):
        with pytest.raises(SeekVLError, match="no room for an answer"):
            call(make(long))
    assert is_empty(engine)


def test_a_batch_is_taken_in_as_it_can_be_served(vlm: seekvl.VLM, make: Make) -> None:
    engine = new_engine(vlm, rows=2, queue=3)
    requests = [make(vlm.processor("Hello"), max_new_tokens=1 + n % 3) for n in range(20)]
    found = {i: piece.completion for i, piece in engine.answer(requests) if piece.completion is not None}
    assert [len(found[n].token_ids) for n in range(20)] == [1 + n % 3 for n in range(20)]
    asked = iter([False] * 4)
    pieces = list(engine.answer(requests, cancel=lambda: next(asked, True)))
    reasons = {i: piece.completion.finish_reason for i, piece in pieces if piece.completion is not None}
    assert sorted(reasons) == list(range(20))
    assert reasons[19] == "cancelled"
    assert is_empty(engine)


def test_what_cannot_be_asked_is_no_cancel(vlm: seekvl.VLM, make: Make) -> None:
    engine = new_engine(vlm)
    with pytest.raises(SeekVLError, match="cancel is called before every step; int cannot be"):
        engine.answer([make(vlm.processor("Hello"))], cancel=5)  # type: ignore[arg-type]
    assert is_empty(engine)


def test_answers_that_are_never_drawn_cost_nothing(vlm: seekvl.VLM, make: Make) -> None:
    engine = new_engine(vlm)
    engine.answer([make(vlm.processor("Hello"))])
    assert not engine.step()
    assert engine.metrics().prompt_tokens == 0


def test_what_is_counted(vlm: seekvl.VLM, make: Make) -> None:
    engine = new_engine(vlm)
    request = make(conversation(vlm, "Is it red?"), max_new_tokens=5)
    first, second = engine.submit(request).result(), engine.submit(request).result()
    metrics = engine.metrics()
    assert metrics.prompt_tokens == 2 * first.usage.prompt_tokens
    assert metrics.image_tokens == 72
    assert metrics.cached_tokens == second.usage.cached_tokens > 36
    assert metrics.generated_tokens == 10
    assert (metrics.prefix_queries, metrics.prefix_hits) == (2, 1)
    assert (metrics.picture_queries, metrics.picture_hits) == (1, 0)
    assert metrics.ended == {"length": 2}
    assert metrics.cache_bytes == engine._runner.cache.nbytes > 0
    assert metrics.feature_bytes == 36 * vlm.config.language.width * 4
    engine.forget()
    assert engine.metrics().feature_bytes == engine.metrics().cache_bytes == 0


@pytest.mark.parametrize(("pictures", "kept"), [(0, 0), (1, 1), (None, 2)])
def test_features_are_kept_within_their_bytes(
    vlm: seekvl.VLM, make: Make, pictures: int | None, kept: int
) -> None:
    one = 36 * vlm.config.language.width * 4
    room = None if pictures is None else pictures * one
    limits = choose_limits(vlm.model, feature_bytes=room)
    engine = Engine(vlm.model, vlm.tokenizer, limits=limits)
    for name in ("grad_224x160", "text_320x200"):
        asked = make(conversation(vlm, "Is it red?", pictures=(name,)), max_new_tokens=2)
        engine.submit(asked).result()
    assert engine.metrics().feature_bytes == kept * one


@pytest.fixture
def served(vlm: seekvl.VLM) -> Iterator[Engine]:
    engine = new_engine(vlm, rows=3)
    engine.start()
    yield engine
    engine.close()
    assert threading.active_count() < 10


def test_a_thread_serves_and_an_idle_one_wakes(served: Engine, vlm: seekvl.VLM, make: Make) -> None:
    request = make(conversation(vlm, "Is it red?"), max_new_tokens=6)
    expected = alone(vlm, request).token_ids
    for _ in range(2):
        pieces = list(served.submit(request))
        assert tuple(piece.token_id for piece in pieces) == expected
        time.sleep(0.02)
    done = dict.fromkeys(range(5), ())
    for index, piece in served.answer([request] * 5):
        if piece.completion is not None:
            done[index] = piece.completion.token_ids
    assert set(done.values()) == {expected}
    with pytest.raises(SeekVLError, match="runs already"):
        served.start()


def test_a_callers_cancel_is_asked_while_a_thread_serves(served: Engine, vlm: seekvl.VLM, make: Make) -> None:
    asked = iter([False] * 3)
    pieces = served.answer(
        [make(vlm.processor("Hello"), max_new_tokens=5000, end_id=-1)], cancel=lambda: next(asked, True)
    )
    *_, (_, last) = pieces
    assert last.completion is not None
    assert last.completion.finish_reason == "cancelled"


def test_draining_finishes_what_runs_and_takes_no_more(vlm: seekvl.VLM, make: Make) -> None:
    for threaded in (False, True):
        engine = new_engine(vlm)
        if threaded:
            engine.start()
        request = make(vlm.processor("Hello"), max_new_tokens=30, end_id=-1)
        handles = [engine.submit(request) for _ in range(3)]
        assert engine.drain(60)
        assert {len(handle.result().token_ids) for handle in handles} == {30}
        with pytest.raises(EngineStopped, match="closed"):
            engine.submit(request)
        assert not engine.alive
        engine.close()
        engine.close()


def test_closing_cancels_what_is_left(vlm: seekvl.VLM, make: Make) -> None:
    for threaded in (False, True):
        engine = new_engine(vlm, rows=2)
        if threaded:
            engine.start()
        handles = [
            engine.submit(make(vlm.processor("Hello"), max_new_tokens=9000, end_id=-1)) for _ in range(4)
        ]
        assert next(handles[0]).completion is None
        assert not engine.drain(0.05)
        engine.close()
        assert [handle.result().finish_reason for handle in handles] == ["cancelled"] * 4
        assert is_empty(engine)


def test_a_thread_that_dies_tells_everybody(
    served: Engine, vlm: seekvl.VLM, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make(vlm.processor("Hello"), max_new_tokens=9000, end_id=-1)
    handles = [served.submit(request) for _ in range(5)]
    assert next(handles[0]).completion is None

    def broken() -> None:
        raise RuntimeError("a fault in the scheduler")

    monkeypatch.setattr(served._scheduler, "plan", broken)
    for handle in handles:
        with pytest.raises((EngineStopped, RuntimeError), match="a fault in the scheduler"):
            handle.result()
    for _ in range(100):
        if not served.alive:
            break
        time.sleep(0.01)
    with pytest.raises(EngineStopped, match="broke: a fault in the scheduler"):
        served.submit(request)
    assert is_empty(served)


def soak(vlm: seekvl.VLM, make: Make, *, clients: int, each: int, seed: int, **limits: Any) -> None:
    """Random requests from some threads, cancelled at random, each compared with the same one alone."""
    print(f"seed {seed}")
    draw = random.Random(seed)
    prompts = [
        vlm.processor("Hello"),
        vlm.processor("Which of the two is brighter? " * 5),
        *[conversation(vlm, question) for question in ("Is it red?", "Why?", "Is it red or is it blue?")],
        conversation(vlm, "Is it red?", "Are you sure?"),
        conversation(vlm, "Compare.", pictures=("grad_224x160", "tiny_5x3")),
    ]
    pool = [
        make(inputs, max_new_tokens=draw.randint(1, 25), temperature=temperature, seed=1)
        for inputs in prompts
        for temperature in (0.0, 0.9)
    ]
    expected = [alone(vlm, request, chunk=limits["chunk"]) for request in pool]
    engine = new_engine(vlm, **limits)
    engine.start()
    wrong: list[str] = []

    def client(number: int) -> None:
        mine = random.Random(seed + number)
        for _ in range(each):
            index = mine.randrange(len(pool))
            try:
                handle = engine.submit(pool[index], client=str(number % 3))
                problem = watch(handle, expected[index], stop_after=mine.choice([None, None, 0, 1, 5]))
            except QueueFull:
                continue
            except Exception as error:
                problem = repr(error)
            if problem:
                wrong.append(f"client {number}, request {index}: {problem}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert is_empty(engine)
    cache = engine._runner.cache
    assert cache.rows * cache.capacity <= engine.limits.tokens
    engine.close()


def watch(handle: Handle, expected: Completion, *, stop_after: int | None) -> str:
    """Draw an answer, cancel it after some pieces, and say what is wrong with it."""
    pieces: list[Piece] = []
    if stop_after == 0:
        handle.cancel()
    for piece in handle:
        pieces.append(piece)
        if len(pieces) == stop_after:
            handle.cancel()
    done = pieces[-1].completion
    if done is None:
        return "no completion"
    if "".join(piece.text for piece in pieces) != done.text:
        return "pieces do not add up"
    if done.finish_reason == "cancelled" and stop_after is not None:
        same = done.token_ids == expected.token_ids[: len(done.token_ids)]
    else:
        same = (done.token_ids, done.text) == (expected.token_ids, expected.text)
    return "" if same else f"{done.token_ids} instead of {expected.token_ids}"


def test_random_requests_in_random_company(vlm: seekvl.VLM, make: Make) -> None:
    soak(vlm, make, clients=6, each=8, seed=11, rows=4, chunk=16, queue=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_requests_for_long(vlm: seekvl.VLM, tiled: seekvl.VLM, make: Make, seed: int) -> None:
    model = (vlm, tiled)[seed % 2]
    tokens = 3000 * 8 * (1 + seed)
    soak(
        model,
        make,
        clients=16,
        each=60,
        seed=seed,
        rows=1 + 2 * seed,
        chunk=8 << seed,
        cache_bytes=tokens * 100,
    )


def test_likelihoods_come_with_their_tokens_and_change_no_answer(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make
) -> None:
    plain = alone(vlm, make(prompts[1], max_new_tokens=6))
    pieces = list(new_engine(vlm).submit(make(prompts[1], max_new_tokens=6, logprobs=2)))
    told = [(piece.token_id, piece.likelihood) for piece in pieces if piece.token_id is not None]
    assert [token for token, _ in told] == list(plain.token_ids)
    for token, likelihood in told:
        assert likelihood is not None
        assert likelihood.top[0] == (token, likelihood.logprob)  # greedy takes the likeliest
        assert likelihood.logprob <= 0.0
        assert len(likelihood.top) == 2
    silent = new_engine(vlm).submit(make(prompts[1], max_new_tokens=6))
    assert all(piece.likelihood is None for piece in silent)


def test_a_thread_tells_when_a_piece_has_come(vlm: seekvl.VLM, prompts: list[ModelInput], make: Make) -> None:
    engine, told = new_engine(vlm), SimpleQueue[Sequence[Handle]]()
    engine.start()
    try:
        handle = engine.submit(make(prompts[0], max_new_tokens=5, end_id=-1), notify=told.put)
        pieces = []
        while not pieces or pieces[-1].completion is None:
            assert told.get(timeout=60) == [handle]
            while (piece := handle.poll()) is not None:
                pieces.append(piece)
        assert sum(piece.token_id is not None for piece in pieces) == 5
    finally:
        engine.close()


def test_a_step_tells_each_asker_once(vlm: seekvl.VLM, prompts: list[ModelInput], make: Make) -> None:
    engine, ours, theirs = new_engine(vlm), list[Sequence[Handle]](), list[Sequence[Handle]]()
    asked = [make(prompt, max_new_tokens=6, end_id=-1) for prompt in prompts[:3]]
    handles = [engine.submit(request, notify=ours.append) for request in asked]
    other = engine.submit(asked[0], notify=theirs.append)
    while engine.step():
        come = [handle for handle in (*handles, other) if handle.wait(seconds=0.0)]
        told = [handle for calls in (ours, theirs) for call in calls for handle in call]
        assert set(told) == set(come), "who has a piece was told, and nobody else"
        assert len(ours) <= 2, "after the prompt, and after the answers"
        assert len(theirs) <= 2
        assert len(told) == len(come), "however many pieces it has"
        assert other not in [handle for call in ours for handle in call]
        for handle in come:
            while handle.poll() is not None:
                pass
        ours.clear()
        theirs.clear()


@pytest.mark.parametrize("running", [False, True])
def test_who_cancels_or_closes_is_told_of_it(
    vlm: seekvl.VLM, prompts: list[ModelInput], make: Make, running: bool
) -> None:
    engine, told = new_engine(vlm), list[Handle]()
    handles = [engine.submit(make(prompts[0], end_id=-1), notify=told.extend) for _ in range(3)]
    while running and any(handle.waiting for handle in handles):
        engine.step()
    told.clear()
    handles[0].cancel()
    assert told == handles[:1]
    engine.close()
    assert told == handles
    assert [handle.result().finish_reason for handle in handles] == ["cancelled"] * 3
