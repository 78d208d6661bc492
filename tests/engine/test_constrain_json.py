import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import seekvl
from seekvl.engine.constrain_json import json_constraint
from seekvl.engine.request import SamplingParams
from seekvl.engine.sampler import Sampler, choose
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError

NANO = Path(seekvl.__file__).parent / "weights" / "nano" / "tokenizer.json"
TOKENIZER = Tokenizer.from_file(NANO)
SCHEMA: Mapping[str, object] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sides": {"type": "integer", "minimum": 3}},
    "required": ["colour", "sides"],
    "additionalProperties": False,
}
NEEDED = pytest.mark.skipif(find_spec("llguidance") is None, reason="needs the extra json")


def say(schema: Mapping[str, object], *, seed: int, most: int = 200) -> str:
    """Answer by random logits that like short tokens and the end."""
    constraint = json_constraint(schema, TOKENIZER, end_id=TOKENIZER.eos_id)
    sampler = Sampler(params=SamplingParams(constrain=schema), constraint=constraint)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(TOKENIZER.token_bytes(token)) for token in range(TOKENIZER.vocab_size)])
    while len(sampler.generated) < most and not constraint.over:
        logits = torch.randn(TOKENIZER.vocab_size + 9, generator=generator)
        logits[: TOKENIZER.vocab_size] -= lengths
        logits[TOKENIZER.encode('"')[0]] += 6
        logits[TOKENIZER.eos_id] = 9.0
        token = choose(logits, sampler)
        if token == TOKENIZER.eos_id:
            break
        sampler.generated.append(token)
    return TOKENIZER.decode(sampler.generated)


@NEEDED
def test_whatever_the_logits_the_answer_follows_the_schema() -> None:
    for seed in range(20):
        found = json.loads(say(SCHEMA, seed=seed))
        assert found.keys() == {"colour", "sides"}
        assert found["colour"] in ("red", "blue")
        assert isinstance(found["sides"], int)
        assert found["sides"] >= 3


@NEEDED
def test_references_and_lists_are_followed() -> None:
    schema = {
        "$defs": {"box": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4}},
        "type": "array",
        "items": {"$ref": "#/$defs/box"},
        "minItems": 1,
        "maxItems": 2,
    }
    for seed in range(5):
        found = json.loads(say(schema, seed=seed))
        assert 1 <= len(found) <= 2
        assert all(len(box) == 4 for box in found)


@NEEDED
def test_a_model_is_held_to_json(vlm: seekvl.VLM) -> None:
    answer = vlm.ask([], "What is it?", constrain=SCHEMA, max_new_tokens=200)
    assert answer.finish_reason == "stop"
    assert json.loads(answer.text)["colour"] in ("red", "blue")
    assert vlm.ask([], "What is it?", constrain="json", max_new_tokens=9).text.startswith("{")


@NEEDED
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": object},
        {"$ref": "#/no"},
        {"properties": 3},
        {"unevaluatedProperties": False},
        {1: {2: {3}}},
    ],
)
def test_what_is_no_schema_is_refused(schema: Mapping[str, object]) -> None:
    with pytest.raises(SeekVLError, match="constrain is no JSON schema: ") as caught:
        json_constraint(schema, TOKENIZER, end_id=TOKENIZER.eos_id)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SeekVLError, match=r"pip install 'seekvl\[json\]'"):
        json_constraint(SCHEMA, TOKENIZER, end_id=TOKENIZER.eos_id)
