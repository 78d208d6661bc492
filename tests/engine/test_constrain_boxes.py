"""Whatever the logits, the text is well-formed, for vocabularies with and without tokens for the marks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import seekvl
from seekvl.engine.choices import Constrain
from seekvl.engine.constrain_boxes import (
    LABEL,
    TEXT,
    State,
    Vocabulary,
    advance,
    box_constraint,
    closing,
)
from seekvl.engine.generate import generate
from seekvl.engine.request import Completion, Request, SamplingParams
from seekvl.engine.sampler import Sampler, choose
from seekvl.processing.grounding import parse_boxes
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError

GOLDEN = Path(__file__).parents[1] / "golden"
NANO = Path(seekvl.__file__).parent / "weights" / "nano" / "tokenizer.json"
TOKENIZERS = {
    "marks are tokens": Tokenizer.from_file(NANO),
    "marks are spelled": Tokenizer.from_file(GOLDEN / "vl1-siglip" / "tokenizer.json"),
}
EVERY = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def follow(text: bytes, state: State | None = TEXT) -> State | None:
    for byte in text:
        state = None if state is None else advance(state, byte)
    return state


def answer(
    tokenizer: Tokenizer,
    scores: Callable[[int], torch.Tensor],
    *,
    length: int,
    constrain: Constrain = "boxes",
    **params: object,
) -> tuple[str, int]:
    """Answer with logits given step by step; return the text and the number of tokens."""
    sampler = Sampler(
        params=SamplingParams(max_new_tokens=length, constrain=constrain, **params),  # type: ignore[arg-type]
        constraint=box_constraint(constrain, tokenizer, end_id=tokenizer.eos_id, room=length),
    )
    while len(sampler.generated) < length:
        token = choose(scores(len(sampler.generated)), sampler)
        if token == tokenizer.eos_id:
            break
        sampler.generated.append(token)
    return tokenizer.decode(sampler.generated).lstrip(), len(sampler.generated)


def random_scores(tokenizer: Tokenizer, seed: int, *, begin: str = "") -> Callable[[int], torch.Tensor]:
    """Logits that like marks and what boxes are written with, and first of all the tokens of `begin`."""
    generator = torch.Generator().manual_seed(seed)
    first = tokenizer.encode(begin)
    liking = torch.zeros(tokenizer.vocab_size + 5)  # some rows beyond the vocabulary
    for token in range(tokenizer.vocab_size):
        if set(tokenizer.token_bytes(token)) & set(b"<|>[],0123456789\n"):
            liking[token] = float(torch.rand((), generator=generator)) * 8

    def scores(step: int) -> torch.Tensor:
        logits = liking + 3 * torch.randn(liking.shape, generator=generator)
        if step < len(first):
            logits[first[step]] = 50.0
        return logits

    return scores


@pytest.mark.parametrize(
    "text",
    [
        "no box at all, a < b <| c <|re",
        "see <|ref|>dog<|/ref|><|det|>[[1, 2, 3, 4], [0, 0, 999, 999]]<|/det|>.\n",
        "<|grounding|><<|ref|><<|/ref|><|det|>[[10, 9, 10, 9]]<|/det|>",
        "<|ref|>a<|re<|/ref|><|det|>[[500, 0, 500, 7]]<|/det|>",
    ],
)
def test_well_formed_text_may_be_written(text: str) -> None:
    assert follow(text.encode()).place == "text"  # type: ignore[union-attr]
    assert parse_boxes(text, strict=True) is not None


@pytest.mark.parametrize(
    "text",
    [
        "<|det|>",
        "a<|/ref|>",
        "<|/det|>",
        "<|ref|>a\n",
        "<|ref|>a<|ref|>",
        "<|ref|>a<|grounding|>",
        "<|ref|>a<|/ref|> ",
        "<|ref|>a<|/ref|><|det|>[1",
        "<|ref|>a<|/ref|><|det|>[[]",
        "<|ref|>a<|/ref|><|det|>[[-",
        "<|ref|>a<|/ref|><|det|>[[01",
        "<|ref|>a<|/ref|><|det|>[[1000",
        "<|ref|>a<|/ref|><|det|>[[1,2",
        "<|ref|>a<|/ref|><|det|>[[1, 2]",
        "<|ref|>a<|/ref|><|det|>[[500, 2, 4",
        "<|ref|>a<|/ref|><|det|>[[50, 2, 5,",
        "<|ref|>a<|/ref|><|det|>[[5, 2, 0",
        "<|ref|>a<|/ref|><|det|>[[5, 30, 5, 3]",
        "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4,",
        "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]],",
        "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]\n",
    ],
)
def test_malformed_text_stops_at_its_last_byte(text: str) -> None:
    assert follow(text.encode()[:-1]) is not None
    assert follow(text.encode()) is None


def test_numbers_of_every_box_can_be_written_and_closed() -> None:
    for x1, y1, x2, y2 in [(0, 0, 0, 0), (7, 99, 70, 100), (99, 5, 100, 50), (999, 999, 999, 999)]:
        text = f"<|ref|><|/ref|><|det|>[[{x1}, {y1}, {x2}, {y2}]]<|/det|>"
        for end in range(len("<|ref|>"), len(text)):
            state = follow(text.encode()[:end])
            assert state is not None
            whole = text[:end] + closing(state).decode()
            assert len(parse_boxes(whole, strict=True)) == 1, whole


@EVERY
def test_every_state_offers_a_way_out(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    generator = torch.Generator().manual_seed(0)
    for start in (TEXT, State("start")):
        state = start
        for _ in range(400):
            offer = vocabulary.offer(state)
            if state.place != "text":
                assert int(offer.closing.min()) < vocabulary.to_close(state)
            wild = offer.closing > 0 if bool((offer.closing > 0).any()) else offer.closing >= 0
            tokens = offer.tokens[wild]
            token = int(tokens[int(torch.randint(len(tokens), (), generator=generator))])
            after = vocabulary.walk(state, token)
            assert after is not None
            assert vocabulary.to_close(after) == int(offer.closing[offer.tokens == token])
            state = after


@EVERY
def test_offers_are_those_of_trying_every_token(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    box = follow(b"<|ref|>a<|/ref|><|det|>[[40, 50, 4")
    assert box is not None
    for state in (TEXT, LABEL, State("start"), State("text", seen=b"<|"), State("label", seen=b"<"), box):
        tokens = range(tokenizer.vocab_size)
        texts = [token for token in tokens if tokenizer.token_bytes(token)]
        expected = {token for token in texts if follow(tokenizer.token_bytes(token), state) is not None}
        assert set(vocabulary.offer(state).tokens.tolist()) == expected


@EVERY
@given(
    seed=st.integers(0, 2**31),
    begin=st.sampled_from(["", "a <|ref|>", "<|ref|>b<|/re", "<|ref|>b<|/ref|><|det|>[[12, 5, 1"]),
    length=st.integers(1, 120),
    temperature=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=30, deadline=None)
def test_whatever_the_logits_the_text_parses_strictly(
    tokenizer: Tokenizer, seed: int, begin: str, length: int, temperature: float
) -> None:
    text, used = answer(
        tokenizer,
        random_scores(tokenizer, seed, begin=begin),
        length=length,
        temperature=temperature,
        seed=seed,
        repetition_penalty=1.3,
    )
    assert used <= length
    assert parse_boxes(text, strict=True) == parse_boxes(text)


@EVERY
@given(seed=st.integers(0, 2**31), length=st.integers(60, 90))
@settings(max_examples=20, deadline=None)
def test_box_first_starts_with_a_box(tokenizer: Tokenizer, seed: int, length: int) -> None:
    text, _ = answer(tokenizer, random_scores(tokenizer, seed), length=length, constrain="box_first")
    assert text.startswith("<|ref|>")
    assert parse_boxes(text, strict=True)


@EVERY
def test_the_shortest_answer_with_a_box(tokenizer: Tokenizer) -> None:
    least = Vocabulary(tokenizer).to_close(State("start"))
    text, used = answer(tokenizer, random_scores(tokenizer, 0), length=least, constrain="box_first")
    assert used == least
    assert len(parse_boxes(text, strict=True)) == 1
    with pytest.raises(SeekVLError, match=f"at least {least} tokens and has room for {least - 1}"):
        box_constraint("box_first", tokenizer, end_id=tokenizer.eos_id, room=least - 1)


BOX = "<|ref|>the dog<|/ref|><|det|>[[10, 20, 300, 400]]<|/det|>"


@EVERY
@pytest.mark.parametrize("constrain", ["boxes", "box_first"])
def test_a_box_that_is_begun_is_gone_on_with(tokenizer: Tokenizer, constrain: Constrain) -> None:
    for end in range(len(BOX) + 1):
        begun = BOX[:end].rstrip()  # as a prompt has it
        constraint = box_constraint(constrain, tokenizer, end_id=tokenizer.eos_id, room=99, begun=begun)
        sampler = Sampler(params=SamplingParams(constrain=constrain), constraint=constraint)
        scores = random_scores(tokenizer, end)
        for step in range(99):
            token = choose(scores(step), sampler)
            if token == tokenizer.eos_id:
                break
            sampler.generated.append(token)
        text = begun + tokenizer.decode(sampler.generated)
        boxes = parse_boxes(text, strict=True)
        assert boxes or constrain == "boxes", text
        if end >= len("<|ref|>the dog<|/ref|>"):
            assert boxes[0].label == "the dog"


@EVERY
def test_a_box_that_is_begun_wrongly_is_refused(tokenizer: Tokenizer) -> None:
    for begun in ("<|det|>", "so: <|ref|>a<|/ref|><|det|>[[5, 5, 4, 9]]<|/det|>", "<|ref|>a\nb"):
        with pytest.raises(SeekVLError, match="begun with a box that is not well-formed"):
            box_constraint("boxes", tokenizer, end_id=tokenizer.eos_id, room=99, begun=begun)
    with pytest.raises(SeekVLError, match="or goes on with one, takes at least"):
        box_constraint("boxes", tokenizer, end_id=tokenizer.eos_id, room=2, begun=BOX[:30])


def test_what_the_model_says_stays_where_it_is_well_formed() -> None:
    tokenizer = TOKENIZERS["marks are tokens"]
    wanted = "It is <|ref|>the dog<|/ref|><|det|>[[1, 20, 300, 999], [0, 0, 5, 5]]<|/det|>."
    ids = [*tokenizer.encode(wanted), tokenizer.eos_id]
    hot = torch.eye(tokenizer.vocab_size) * 9
    text, _ = answer(tokenizer, lambda step: hot[ids[step]], length=100, repetition_penalty=2.0)
    assert text == wanted


def test_the_answer_ends_only_outside_of_boxes() -> None:
    tokenizer = TOKENIZERS["marks are tokens"]
    constraint = box_constraint("boxes", tokenizer, end_id=tokenizer.eos_id, room=100)
    assert constraint is not None
    scores, said = torch.zeros(tokenizer.vocab_size), ""
    for token in tokenizer.encode("a <|ref|>b<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|> c"):
        may_end = bool(constraint.narrow(scores)[tokenizer.eos_id].isfinite())
        assert may_end == (said.count("<|ref|>") == said.count("<|/det|>"))
        constraint.take(token)
        said += tokenizer.decode([token])


def test_a_vocabulary_that_cannot_spell_boxes() -> None:
    backend = Backend(models.WordLevel({"a": 0, "<b>": 1, "<e>": 2, "<i>": 3}, unk_token="a"))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<b>", "<e>", "<i>"])
    tokenizer = Tokenizer(backend, bos="<b>", eos="<e>", image="<i>", pad=None)
    with pytest.raises(SeekVLError, match="boxes cannot be forced"):
        box_constraint("boxes", tokenizer, end_id=tokenizer.eos_id, room=9)


def test_impossible_wishes() -> None:
    with pytest.raises(SeekVLError, match="constrain is 'box'"):
        SamplingParams(constrain="box")  # type: ignore[arg-type]
    with pytest.raises(SeekVLError, match="constrain or stop, not both"):
        SamplingParams(constrain="boxes", stop="]")
    assert not SamplingParams(constrain="boxes").plain_greedy


@pytest.fixture(scope="module")
def nano() -> seekvl.VLM:
    return seekvl.load("seekvl-nano", device="cpu", dtype="float32")


PICTURE = Path(__file__).parents[2] / "examples" / "sign.png"


def completions(vlm: seekvl.VLM, questions: list[str], params: SamplingParams) -> list[Completion]:
    requests = []
    for question in questions:
        inputs = vlm.processor([{"role": "user", "content": question, "images": [str(PICTURE)]}])
        requests.append(Request(inputs=inputs, params=params))
    done: dict[int, Completion] = {}
    pieces: dict[int, str] = {}
    for index, piece in generate(vlm.model, vlm.tokenizer, requests=requests):
        pieces[index] = pieces.get(index, "") + piece.text
        if piece.completion is not None:
            done[index] = piece.completion
            assert pieces[index] == piece.completion.text
    return [done[index] for index in range(len(questions))]


def test_nano_says_the_same_box_and_is_made_to_say_one(nano: seekvl.VLM) -> None:
    free, kept = (
        completions(nano, ["Where is the sign?"], SamplingParams(max_new_tokens=60, constrain=constrain))[0]
        for constrain in (None, "boxes")
    )
    assert free.text == kept.text
    assert len(parse_boxes(kept.text, strict=True)) == 1
    first = SamplingParams(max_new_tokens=60, constrain="box_first")
    (forced,) = completions(nano, ["What does the sign say?"], first)
    assert forced.text.startswith("<|ref|>")
    assert parse_boxes(forced.text, strict=True)


def test_a_batch_of_hot_answers_is_well_formed_row_by_row(nano: seekvl.VLM) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=4.0, seed=1, constrain="box_first")
    done = completions(nano, ["Where is the sign?", "What is it?", "Hello"], params)
    assert all(parse_boxes(completion.text, strict=True) for completion in done)
