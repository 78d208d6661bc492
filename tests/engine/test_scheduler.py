"""The scheduler alone: whole numbers in, whole numbers out."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekvl.engine.cache import BLOCK
from seekvl.engine.prompt import Shown, make_prompt
from seekvl.engine.scheduler import WORTH_WAITING, Encode, Fill, Job, Limits, Plan, QueueFull, Scheduler
from seekvl.runtime import SeekVLError

LIMITS = Limits(rows=3, tokens=3 * 2 * BLOCK, longest=4 * BLOCK, chunk=8)


def job(
    ids: Sequence[int] = range(5),
    *,
    pictures: Sequence[Shown] = (),
    room: int = 4,
    client: str = "",
    deadline: float | None = None,
    chunk: int = 8,
    seamless: bool = False,
) -> Job:
    prompt = make_prompt(ids, pictures, chunk=chunk, seamless=seamless)
    return Job(prompt=prompt, room=room, client=client, deadline=deadline)


def carry_out(scheduler: Scheduler, plan: Plan, *, said: dict[Job, int]) -> None:
    """Do what the engine does, without a network; an answer ends when its room is used up."""
    if isinstance(plan.work, Encode):
        scheduler.encoded(plan.work)
    elif plan.work is not None:
        scheduler.filled(plan.work)
        if plan.work.job.answering:
            _say(scheduler, plan.work.job, said)
    for one in plan.decode:
        scheduler.fed(one, [1])
        _say(scheduler, one, said)


def _say(scheduler: Scheduler, one: Job, said: dict[Job, int]) -> None:
    said[one] = said.get(one, 0) + 1
    if said[one] == one.room:
        scheduler.end(one)


def run(scheduler: Scheduler, *, steps: int = 10_000) -> list[Plan]:
    plans, said = [], {}
    for _ in range(steps):
        plan = scheduler.plan()
        if plan is None:
            return plans
        plans.append(plan)
        carry_out(scheduler, plan, said=said)
    raise AssertionError("it never comes to an end")


def test_a_prompt_goes_through_in_pieces_and_then_a_token_a_step() -> None:
    scheduler = Scheduler(LIMITS)
    one = job(range(20), room=3)
    scheduler.add(one)
    plans = run(scheduler)
    assert [plan.work for plan in plans] == [Fill(one, 0, 8), Fill(one, 8, 16), Fill(one, 16, 20), None, None]
    assert [plan.decode for plan in plans] == [()] * 3 + [(one,)] * 2
    assert one.ended
    assert scheduler.idle


def test_a_picture_is_encoded_when_its_first_token_is_due() -> None:
    scheduler = Scheduler(replace(LIMITS, chunk=4))
    one = job(range(14), pictures=[Shown(1, 5, b"a"), Shown(6, 9, b"b")], room=1, chunk=4)
    scheduler.add(one)
    works = [plan.work for plan in run(scheduler)]
    assert works == [
        Encode(one, 0),
        Fill(one, 0, 4),
        Fill(one, 4, 5),
        Encode(one, 1),
        Fill(one, 5, 9),
        Fill(one, 9, 13),
        Fill(one, 13, 14),
    ]


def test_a_long_prompt_holds_running_answers_up_for_one_piece_at_a_time() -> None:
    scheduler = Scheduler(LIMITS)
    short, long = job(range(3), room=60), job(range(100, 400), room=1)
    scheduler.add(short)
    scheduler.add(long)
    plans = run(scheduler)
    during = [plan for plan in plans if isinstance(plan.work, Fill) and plan.work.job is long]
    assert len(during) == 38
    assert all(plan.decode == (short,) for plan in during[1:])
    assert max(plan.work.end - plan.work.start for plan in during if isinstance(plan.work, Fill)) == 8


def test_prompts_take_turns() -> None:
    scheduler = Scheduler(LIMITS)
    long, short = job(range(100, 200), room=1), job(range(6), room=1)
    scheduler.add(long)
    scheduler.add(short)
    ended = []
    for plan in run(scheduler):
        if isinstance(plan.work, Fill) and plan.work.end == len(plan.work.job.prompt):
            ended.append(plan.work.job)
    assert ended == [short, long]


def test_clients_take_turns() -> None:
    scheduler = Scheduler(replace(LIMITS, rows=1))
    many = [job(range(n, n + 4), room=1, client="many") for n in range(0, 60, 10)]
    for one in many[:5]:
        scheduler.add(one)
    few = [job(range(n, n + 4), room=1, client="few") for n in (100, 110)]
    for one in (*few, many[5]):
        scheduler.add(one)
    order = [plan.work.job for plan in run(scheduler) if isinstance(plan.work, Fill)]
    assert order == [many[0], few[0], many[1], few[1], *many[2:]]


def test_who_comes_again_and_again_overtakes_nobody() -> None:
    scheduler = Scheduler(replace(LIMITS, rows=1))
    patient = [job(range(n, n + 4), room=1, client="patient") for n in range(3)]
    for one in patient:
        scheduler.add(one)
    said: dict[Job, int] = {}
    for number in range(40):  # a new client with each step
        scheduler.add(job(range(1000 + number, 1004 + number), room=1, client=f"new {number}"))
        plan = scheduler.plan()
        assert plan is not None
        carry_out(scheduler, plan, said=said)
    assert all(one.ended for one in patient)


def test_the_queue_has_a_limit_and_says_so() -> None:
    scheduler = Scheduler(replace(LIMITS, queue=2))
    waiting = [job(), job(range(7))]
    for one in waiting:
        scheduler.add(one)
    with pytest.raises(QueueFull, match="2 requests wait, the limit is 2"):
        scheduler.add(job())
    scheduler.end(waiting[1])
    scheduler.add(job(range(9)))
    assert scheduler.waiting == 2
    run(scheduler)
    assert scheduler.waiting == 0


def test_what_can_never_run_is_refused() -> None:
    for one in (job(range(4 * BLOCK), room=1), job(room=0), job(())):
        with pytest.raises(SeekVLError, match="does not fit"):
            Scheduler(LIMITS).add(one)


@pytest.mark.parametrize("name", ["rows", "tokens", "longest", "chunk", "queue"])
def test_limits_leave_room(name: str) -> None:
    with pytest.raises(SeekVLError, match=f"{name} must be at least 1, not 0"):
        replace(LIMITS, **{name: 0})
    with pytest.raises(SeekVLError, match="guess must be at least 0"):
        replace(LIMITS, guess=-1)


def test_the_overdue_are_named() -> None:
    scheduler = Scheduler(replace(LIMITS, rows=1))
    jobs = [job(range(n, n + 3), deadline=deadline) for n, deadline in ((0, 5.0), (10, None), (20, 7.0))]
    for one in jobs:
        scheduler.add(one)
    scheduler.plan()
    assert scheduler.overdue(4.9) == []
    assert scheduler.overdue(5.0) == jobs[:1]
    assert set(scheduler.overdue(8.0)) == {jobs[0], jobs[2]}
    for one in (jobs[0], jobs[2]):
        scheduler.end(one)
    assert scheduler.overdue(8.0) == []


def answer(scheduler: Scheduler, one: Job) -> Job:
    scheduler.add(one)
    run(scheduler)
    return one


def test_a_finished_prompt_is_taken_over_up_to_its_last_cut() -> None:
    scheduler = Scheduler(LIMITS)
    picture = [Shown(2, 11, b"a")]
    first = answer(scheduler, job(range(16), pictures=picture, room=2))
    second = answer(scheduler, job([*range(12), 90, 91], pictures=picture, room=2))
    other = answer(scheduler, job(range(16), pictures=[Shown(2, 11, b"b")], room=2))
    assert (first.cached, second.cached, other.cached) == (0, 11, 0)
    assert (scheduler.queries, scheduler.hits) == (3, 1)


def test_a_seamless_prompt_is_taken_over_up_to_any_of_its_tokens() -> None:
    scheduler = Scheduler(LIMITS)
    picture = [Shown(2, 11, b"a")]
    answer(scheduler, job(range(16), pictures=picture, room=3, seamless=True))
    found = {
        "the same": job(range(16), pictures=picture, room=3, seamless=True),
        "what was answered": job([*range(16), 1, 1, 7], pictures=picture, seamless=True),
        "another tail": job([*range(13), 90, 91], pictures=picture, seamless=True),
        "another picture": job(range(16), pictures=[Shown(2, 11, b"b")], seamless=True),
        "cut at pictures": job(range(16), pictures=picture),
    }
    cached = {name: answer(scheduler, one).cached for name, one in found.items()}
    assert cached == {
        "the same": 15,  # never the last one, whose logits are wanted
        "what was answered": 16,  # a token that was decoded has other bits
        "another tail": 13,
        "another picture": 2,
        "cut at pictures": 0,
    }


def test_a_short_beginning_is_not_waited_for() -> None:
    for shared, waits in ((WORTH_WAITING - 1, False), (WORTH_WAITING, True)):
        scheduler = Scheduler(replace(LIMITS, chunk=200))
        jobs = [job([*range(shared), tail, *[99] * 9], chunk=200, seamless=True) for tail in (50, 60)]
        for one in jobs:
            scheduler.add(one)
        scheduler.plan()
        scheduler.plan()
        assert (jobs[1].slot is None) == waits
        run(scheduler)
        assert jobs[1].cached == (shared if waits else 0)


def test_where_bits_may_differ_every_token_is_taken_over() -> None:
    scheduler = Scheduler(replace(LIMITS, exact=False))
    answer(scheduler, job(range(16), room=3))
    assert answer(scheduler, job([*range(16), 1, 1, 50, 51], room=2)).cached == 18  # the answer 1 1 too
    assert answer(scheduler, job([*range(13), 70], room=2)).cached == 13
    assert answer(scheduler, job([*range(13), 70], room=2)).cached == 13


def test_who_begins_alike_waits_for_what_is_being_computed() -> None:
    scheduler = Scheduler(LIMITS)
    jobs = [job([*range(17), tail], room=9) for tail in (50, 60, 70)]
    for one in jobs:
        scheduler.add(one)
    plans = run(scheduler)
    assert [one.cached for one in jobs] == [0, 16, 16]
    assert max(len(plan.decode) for plan in plans) == 3


def test_the_prefix_that_was_not_used_for_longest_gives_way() -> None:
    scheduler = Scheduler(LIMITS)
    starts = [list(range(n, n + 10)) for n in (0, 100, 200, 300)]
    for ids in (*starts[:3], starts[0], starts[3]):
        answer(scheduler, job(ids, room=1))
    assert answer(scheduler, job(starts[0], room=1)).cached == 8
    assert answer(scheduler, job(starts[2], room=1)).cached == 8
    assert answer(scheduler, job(starts[1], room=1)).cached == 0


def test_a_small_share_does_not_cost_a_large_prefix() -> None:
    scheduler = Scheduler(LIMITS)
    long = list(range(200))
    answer(scheduler, job(long, room=1))
    assert answer(scheduler, job([*range(8), 500, 501], room=1)).cached == 8
    assert answer(scheduler, job(long, room=1)).cached == 192


def test_one_that_asks_for_too_much_runs_alone() -> None:
    scheduler = Scheduler(replace(LIMITS, tokens=BLOCK))
    large, small = job(range(3 * BLOCK), room=2), job(range(900, 904), room=2)
    for one in (large, small):
        scheduler.add(one)
    plans = run(scheduler)
    assert all(plan.rows == 1 for plan in plans)
    assert plans[-1].capacity == BLOCK  # and its room is given back


def test_forgetting_reaches_running_jobs() -> None:
    scheduler = Scheduler(LIMITS)
    answer(scheduler, job(range(20), room=1))
    running = job(range(40, 60), room=3)
    scheduler.add(running)
    for _ in range(3):
        plan = scheduler.plan()
        assert plan is not None
        carry_out(scheduler, plan, said={})
    scheduler.forget()
    run(scheduler)
    assert running.ended
    assert answer(scheduler, job(range(20), room=1)).cached == 0
    assert answer(scheduler, job(range(40, 60), room=1)).cached == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_comes_the_promises_hold(data: st.DataObject) -> None:
    limits = Limits(
        rows=data.draw(st.integers(1, 4)),
        tokens=data.draw(st.integers(1, 6)) * BLOCK,
        longest=4 * BLOCK,
        chunk=data.draw(st.sampled_from([3, 8, 300])),
        exact=data.draw(st.booleans()),
        guess=data.draw(st.sampled_from([0, 4])),
    )
    scheduler, said, jobs = Scheduler(limits), {}, []
    held: dict[int, list[int]] = {}
    numbers = count()

    def come() -> None:
        beginning = [1] * data.draw(st.integers(0, 20))
        size = data.draw(st.sampled_from([1, 5, 40, BLOCK, 3 * BLOCK]))
        ids = [*beginning, *range(10, 10 + size), 1000 + next(numbers)]
        room = data.draw(st.integers(1, 9))
        client, seamless = data.draw(st.sampled_from("abc")), data.draw(st.booleans())
        one = job(ids, room=room, client=client, chunk=limits.chunk, seamless=seamless)
        scheduler.add(one)
        jobs.append(one)

    for _ in range(data.draw(st.integers(1, 60))):
        match data.draw(st.sampled_from(["come", "cancel", "fail", "step", "step", "step"])):
            case "come":
                come()
            case "cancel" | "fail" as how if jobs:
                scheduler.end(data.draw(st.sampled_from(jobs)), keep=how == "cancel")
            case _:
                step(scheduler, said, held)
    for _ in range(5000):
        if not step(scheduler, said, held):
            break
    assert scheduler.idle
    assert all(one.ended for one in jobs)
    assert all(said.get(one, 0) <= one.room for one in jobs)


def step(scheduler: Scheduler, said: dict[Job, int], held: dict[int, list[int]]) -> bool:
    """Make one step, follow what each slot really holds, and check what was promised."""
    plan, limits = scheduler.plan(), scheduler.limits
    if plan is None:
        return False
    running = scheduler.running
    assert len(running) <= limits.rows
    slots = [one.slot for one in running]
    assert len(set(slots)) == len(slots)
    assert all(slot is not None and slot < plan.rows for slot in slots)
    assert plan.rows * plan.capacity <= limits.tokens or (len(running) == 1 and plan.rows == 1)
    for slot in list(held):
        held[slot] = held[slot][: plan.capacity]
        if slot >= plan.rows:
            del held[slot]
    if plan.placement is not None:
        placed = plan.placement
        shared = held.get(placed.source, [])[: placed.shared]
        assert shared == list(placed.job.prompt.ids[: placed.shared])  # it is really there
        assert placed.shared < len(placed.job.prompt)
        prompt = placed.job.prompt
        assert not limits.exact or prompt.seamless or placed.shared in (0, *prompt.cuts)
        held[placed.slot] = shared
    if isinstance(plan.work, Fill):
        work = plan.work
        assert work.job.slot is not None
        assert work.end <= plan.capacity
        assert 0 < work.end - work.start <= limits.chunk
        assert held[work.job.slot] == list(work.job.prompt.ids[: work.start])
        held[work.job.slot] = list(work.job.prompt.ids[: work.end])
    for one in plan.decode:
        assert one.slot is not None
        held[one.slot] = [*held[one.slot], 1]
        assert len(held[one.slot]) <= plan.capacity
        assert scheduler.held(one) + 1 == len(held[one.slot])
    assert plan.work is not None or plan.decode
    carry_out(scheduler, plan, said=said)
    return True
