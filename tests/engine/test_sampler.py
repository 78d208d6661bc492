import math
from collections import Counter

import pytest
import torch

from seekvl.engine.request import PENALTIES, SamplingParams
from seekvl.engine.sampler import Sampler, choose, distribution, likelihood, peaks, penalise, subtract
from seekvl.runtime import SeekVLError

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def draws(count: int = 2000, **params: object) -> Counter[int]:
    sampler = Sampler(params=SamplingParams(seed=7, **params))  # type: ignore[arg-type]
    return Counter(choose(LOGITS, sampler) for _ in range(count))


def test_temperature_zero_takes_the_largest() -> None:
    rows = torch.stack((LOGITS, LOGITS.flip(0)))
    greedy = Sampler(params=SamplingParams())
    assert [choose(row, greedy) for row in rows] == [1, 2]
    assert [choose(row, greedy, peak=peak) for row, peak in zip(rows, peaks(rows), strict=True)] == [1, 2]


def test_draws_follow_the_probabilities() -> None:
    counts = draws(8000, temperature=1.0)
    expected = LOGITS.softmax(-1)
    for token, probability in enumerate(expected.tolist()):
        assert counts[token] / 8000 == pytest.approx(probability, abs=0.02)


def test_a_lower_temperature_is_more_certain() -> None:
    half = distribution(LOGITS, SamplingParams(temperature=0.5))
    assert torch.allclose(half, (LOGITS.double() * 2).softmax(-1))


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-40])
def test_a_tiny_temperature_is_greedy_and_not_a_crash(temperature: float) -> None:
    assert draws(20, temperature=temperature) == {1: 20}


def test_top_k_keeps_the_likeliest() -> None:
    assert set(draws(temperature=5.0, top_k=2)) == {1, 2}
    assert set(draws(200, temperature=5.0, top_k=1)) == {1}
    assert set(draws(temperature=5.0, top_k=100)) == {0, 1, 2, 3}


def test_top_p_keeps_what_reaches_it() -> None:
    # probabilities 0.0889, 0.6572, 0.2418, 0.0120
    assert set(draws(temperature=1.0, top_p=0.6)) == {1}
    assert set(draws(temperature=1.0, top_p=0.7)) == {1, 2}
    assert set(draws(temperature=1.0, top_p=0.95)) == {0, 1, 2}
    assert set(draws(200, temperature=1.0, top_p=1e-9)) == {1}


def test_top_p_counts_within_top_k() -> None:
    # among the two likeliest the first has 0.7311
    assert set(draws(temperature=1.0, top_k=2, top_p=0.72)) == {1}


def test_the_penalty_hits_each_generated_token_once() -> None:
    scores = penalise(LOGITS, [1, 1, 3], penalty=2.0)
    assert scores.tolist() == [1.0, 1.5, 2.0, -2.0]
    assert LOGITS.tolist() == [1.0, 3.0, 2.0, -1.0]


def test_the_penalty_counts_at_temperature_zero() -> None:
    sampler = Sampler(params=SamplingParams(repetition_penalty=2.0), generated=[1])
    assert choose(LOGITS, sampler) == 2


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_strongest_penalties_overflow_no_logit(penalty: float, temperature: float) -> None:
    params = SamplingParams(repetition_penalty=penalty, temperature=temperature, seed=0)
    logits = torch.tensor([3e4, -3e4, 2.0, -1.0])
    scores = penalise(logits, range(4), penalty=penalty)
    assert scores.isfinite().all()
    assert choose(logits, Sampler(params=params, generated=[0, 1, 2, 3])) == 0


def test_presence_counts_a_token_once_and_frequency_as_often_as_it_came() -> None:
    once = SamplingParams(presence_penalty=1.5)
    assert subtract(LOGITS, [1, 1, 3], once).tolist() == [1.0, 1.5, 2.0, -2.5]
    often = SamplingParams(frequency_penalty=1.5)
    assert subtract(LOGITS, [1, 1, 3], often).tolist() == [1.0, 0.0, 2.0, -2.5]
    assert subtract(LOGITS, [], often) is LOGITS
    assert choose(LOGITS, Sampler(params=once, generated=[1])) == 2
    assert choose(LOGITS, Sampler(params=SamplingParams(presence_penalty=-9.0), generated=[3])) == 3


def test_likelihoods_are_those_of_the_raw_logits() -> None:
    told = likelihood(LOGITS, 2, most=2)
    expected = LOGITS.log_softmax(0)
    assert told.logprob == pytest.approx(float(expected[2]))
    assert [token for token, _ in told.top] == [1, 2]
    assert [value for _, value in told.top] == pytest.approx(expected[[1, 2]].tolist())
    assert likelihood(LOGITS, 0, most=0).top == ()
    assert len(likelihood(LOGITS, 0, most=99).top) == len(LOGITS)


def test_a_seed_repeats_and_another_differs() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(params=SamplingParams(temperature=5.0, seed=seed))
        return [choose(LOGITS, sampler) for _ in range(40)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = torch.tensor([0.0, bad, 1.0])
    with pytest.raises(SeekVLError, match="token 1 are not finite"):
        choose(logits, Sampler(params=SamplingParams(temperature=temperature)))


def test_the_penalty_counts_tokens_of_the_prompt_where_it_is_told_to() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    assert choose(LOGITS, Sampler(params=params)) == 1
    assert choose(LOGITS, Sampler(params=params, prompt=frozenset({1, 3}))) == 2
    assert choose(LOGITS, Sampler(params=params, prompt=frozenset({1}), generated=[2])) == 1
