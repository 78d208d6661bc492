import math
from typing import Any

import pytest

from seekvl.engine.request import SamplingParams
from seekvl.runtime import SeekVLError


def test_defaults_are_greedy() -> None:
    assert SamplingParams().plain_greedy
    assert not SamplingParams(temperature=0.1).plain_greedy
    assert not SamplingParams(repetition_penalty=1.1).plain_greedy
    assert not SamplingParams(presence_penalty=0.1).plain_greedy
    assert not SamplingParams(frequency_penalty=-0.1).plain_greedy
    assert SamplingParams(logprobs=3).plain_greedy


@pytest.mark.parametrize(
    ("stop", "stops"), [(None, ()), ("User:", ("User:",)), (("a", "b"), ("a", "b")), (["a"], ("a",))]
)
def test_stop_is_one_string_or_several(stop: Any, stops: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stops == stops


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -5),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", True),
        ("max_new_tokens", None),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.0001),
        ("top_p", math.nan),
        ("top_p", True),
        ("top_k", 0),
        ("top_k", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e300),
        ("seed", 1.5),
        ("seed", "a"),
        ("seed", False),
        ("stop", ""),
        ("stop", ("User:", "")),
        ("stop", (1,)),
        ("stop", 7),
    ],
)
def test_impossible_values_are_named(name: str, value: object) -> None:
    with pytest.raises(SeekVLError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
