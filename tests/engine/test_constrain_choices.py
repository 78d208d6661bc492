from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seekvl
from seekvl.engine.constrain_choices import choice_constraint
from seekvl.engine.request import SamplingParams
from seekvl.engine.sampler import Sampler, choose
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError

NANO = Path(seekvl.__file__).parent / "weights" / "nano" / "tokenizer.json"
TOKENIZER = Tokenizer.from_file(NANO)


def say(texts: Sequence[str], *, room: int, seed: int, end_score: float = 0.0) -> tuple[str, list[int], bool]:
    """Answer by random logits; return the text, its tokens, and whether it came to its end."""
    constraint = choice_constraint(texts, TOKENIZER, end_id=TOKENIZER.eos_id, room=room)
    sampler = Sampler(params=SamplingParams(constrain=list(texts)), constraint=constraint)
    generator = torch.Generator().manual_seed(seed)
    while len(sampler.generated) < room and not constraint.over:
        logits = torch.randn(TOKENIZER.vocab_size + 9, generator=generator)
        logits[TOKENIZER.eos_id] = end_score
        token = choose(logits, sampler)
        if token == TOKENIZER.eos_id:
            break
        sampler.generated.append(token)
    text = TOKENIZER.decode(sampler.generated)
    return text.removeprefix(" "), sampler.generated, text.removeprefix(" ") in texts


WORDS = st.text(alphabet="ab é猫<|.", min_size=1, max_size=8).filter(lambda text: text == text.strip())


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(WORDS, min_size=1, max_size=5),
    seed=st.integers(0, 2**30),
    spare=st.integers(0, 3),
    end_score=st.sampled_from([-9.0, 9.0]),
)
def test_whatever_the_logits_the_answer_is_one_of_the_texts(
    texts: list[str], seed: int, spare: int, end_score: float
) -> None:
    least = min(fewest(text) for text in texts)
    text, tokens, whole = say(texts, room=least + spare, seed=seed, end_score=end_score)
    assert whole, text
    assert len(tokens) <= least + spare


def fewest(text: str) -> int:
    """The tokens a text takes at least, found by trying rooms."""
    for room in range(1, 40):
        try:
            choice_constraint([text], TOKENIZER, end_id=TOKENIZER.eos_id, room=room)
        except SeekVLError:
            continue
        return room
    raise AssertionError(text)


def test_every_text_and_every_spelling_can_be_reached() -> None:
    found = {tuple(say(["the", "then", "that"], room=9, seed=seed)[1]) for seed in range(300)}
    texts = {TOKENIZER.decode(tokens).strip() for tokens in found}
    assert texts == {"the", "then", "that"}
    assert len(found) > 6
    assert any(TOKENIZER.decode(tokens).startswith(" ") for tokens in found)


def test_an_answer_ends_where_nothing_can_follow() -> None:
    constraint = choice_constraint(["a", "ab"], TOKENIZER, end_id=TOKENIZER.eos_id, room=5)
    a, b = (TOKENIZER.encode(letter)[0] for letter in "ab")
    constraint.take(a)
    assert not constraint.over
    logits = torch.zeros(TOKENIZER.vocab_size)
    assert constraint.narrow(logits).isfinite().nonzero().flatten().tolist() == sorted([TOKENIZER.eos_id, b])
    constraint.take(b)
    assert constraint.over


def test_no_room_and_letters_that_cannot_be_spelled_are_named() -> None:
    least = fewest("squirrel")
    with pytest.raises(SeekVLError, match=rf"takes {least} tokens and the answer has room for {least - 1}"):
        choice_constraint(["squirrel"], TOKENIZER, end_id=TOKENIZER.eos_id, room=least - 1)


def test_a_model_is_held_to_the_list(vlm: seekvl.VLM) -> None:
    texts = ["a red square", "a red circle", "nothing"]
    answer = vlm.ask([], "What is it?", constrain=texts)
    assert answer.text in texts
    assert answer.finish_reason == "stop"
    many = vlm.batch(["What?", "Why?"], constrain=tuple(texts), temperature=2.0, seed=1)
    assert {one.text for one in many} <= set(texts)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ([], "empty list"),
        ([""], "needs letters"),
        (["a", " b"], "no space at its ends"),
        (["a", 3], "lists 3"),
        (["\ud800"], "lone surrogate"),
        ("box", "is 'box'; use"),
        (7, "is 7; use"),
        ({"a"}, "use 'boxes', 'box_first', 'json', a list of texts, a JSON schema or None"),
    ],
)
def test_what_is_no_form_is_refused(form: object, message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        SamplingParams(constrain=form)  # type: ignore[arg-type]
    with pytest.raises(SeekVLError, match="not both"):
        SamplingParams(constrain=["yes"], stop="x")
