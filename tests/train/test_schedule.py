import math

import pytest

from seekvl.runtime import SeekVLError
from seekvl.train.schedule import LanguageShare, Place, Schedule


def test_warmup_rises_in_a_straight_line_to_the_peak() -> None:
    for shape in ("cosine", "step", "constant"):
        schedule = Schedule(shape=shape, warmup=10)
        assert [schedule.factor(step, steps=100) for step in (0, 4, 9, 10)] == pytest.approx(
            [0.1, 0.5, 1.0, 1.0]
        )


def test_cosine_is_half_way_at_half_time_and_ends_at_its_floor() -> None:
    assert Schedule(shape="cosine").factor(50, steps=100) == pytest.approx(0.5)
    assert Schedule(shape="cosine").factor(100, steps=100) == 0.0
    assert Schedule(shape="cosine", floor=0.1, warmup=20).factor(60, steps=100) == pytest.approx(0.55)
    assert Schedule(shape="cosine", floor=0.1).factor(100, steps=100) == pytest.approx(0.1)


def test_step_divides_by_the_root_of_ten_at_each_milestone() -> None:
    schedule = Schedule(shape="step")
    factors = [schedule.factor(step, steps=100) for step in (0, 49, 50, 74, 75, 99)]
    root = math.sqrt(10)
    assert factors == pytest.approx([1, 1, 1 / root, 1 / root, 0.1, 0.1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": "linear"}, "schedule 'linear' is unknown"),
        ({"shape": "cosine", "warmup": -1}, "warmup is -1 steps"),
        ({"shape": "cosine", "floor": 1.5}, "floor is 1.5"),
        ({"shape": "step", "milestones": (0.5, 1.0)}, "must lie between 0 and 1"),
    ],
)
def test_impossible_schedules_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        Schedule(**fields)


def test_share_is_exact_to_one_step_at_every_moment() -> None:
    language = LanguageShare(target=0.7, warmup=2000)
    area, text = 0.0, 0
    for step in range(6000):
        assert abs(language.text_steps(step) - area) <= 1 + 1e-6
        assert language.text_steps(step) == text
        text += language.is_text_step(step)
        area += (language.share(step) + language.share(step + 1)) / 2


def test_shares_of_the_modality_warmup() -> None:
    language = LanguageShare(target=0.7, warmup=2000)

    def measured(first: int, last: int) -> float:
        return (language.text_steps(last) - language.text_steps(first)) / (last - first)

    assert measured(0, 500) == pytest.approx(0.962, abs=0.002)
    assert measured(1000, 2000) == pytest.approx(0.775, abs=0.002)
    assert measured(2000, 42000) == 0.7
    kinds = "".join("t" if language.is_text_step(step) else "m" for step in range(2000, 4000))
    assert "tttt" not in kinds
    assert "mm" not in kinds


def test_both_streams_run_without_gaps() -> None:
    language = LanguageShare(target=0.3, warmup=50)
    seen: dict[bool, list[int]] = {True: [], False: []}
    for step in range(500):
        place = language.place(step)
        seen[place.language].append(place.index)
    assert seen[True] == list(range(len(seen[True])))
    assert seen[False] == list(range(len(seen[False])))


def test_place_far_out_is_known_at_once() -> None:
    assert LanguageShare(target=0.7).place(10**12) == Place(language=False, index=3 * 10**11)


@pytest.mark.parametrize(("share", "text"), [(0.0, 0), (1.0, 100), (0.5, 50)])
def test_constant_shares(share: float, text: int) -> None:
    language = LanguageShare(target=share)
    assert sum(language.is_text_step(step) for step in range(100)) == text


@pytest.mark.parametrize(
    "fields", [{"target": 1.2}, {"target": 0.5, "start": -0.1}, {"target": 0.5, "warmup": -3}]
)
def test_impossible_shares_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(SeekVLError, match="language share"):
        LanguageShare(**fields)
