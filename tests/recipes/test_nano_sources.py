from pathlib import Path

import pytest
import torch

from seekvl.corpus import nano as corpus
from seekvl.data.sample import Sample
from seekvl.processing.conversation import Conversation, Message, Text
from seekvl.processing.encode import Processor
from seekvl.processing.grounding import format_box
from seekvl.processing.tokenizer import Tokenizer
from seekvl.recipes import nano, nano_moe
from seekvl.recipes.nano_sources import PictureSource, TextSource, weigh_answers


@pytest.fixture(scope="module", params=["nano", "nano-moe"])
def prepare(request: pytest.FixtureRequest, words: Path, moe_words: Path) -> Processor:
    if request.param == "nano":
        return nano.processor(Tokenizer.from_file(words))
    return nano_moe.processor(nano_moe.open_words(moe_words))


def test_long_answers_count_more_than_short_ones_but_not_by_their_length(prepare: Processor) -> None:
    encoded = prepare.encode(corpus.sample(0, 8, questions=5).conversation, train=True)
    weighed = weigh_answers(encoded, tokenizer=prepare.tokenizer).loss_weights
    assert weighed is not None
    assert encoded.loss_weights is not None
    assert torch.equal(weighed > 0, encoded.loss_weights > 0)
    answers = torch.split(weighed, _runs(encoded.loss_weights > 0))
    lengths = {len(answer) for answer in answers if answer[0] > 0}
    assert len(lengths) > 1
    for answer in answers:
        if answer[0] > 0:
            assert answer[0].item() == pytest.approx(len(answer) ** -0.5)


def test_late_digits_of_a_box_hardly_count(prepare: Processor) -> None:
    pairs = _weighed(prepare, box=(7, 45, 203, 999), label="7")
    label, *numbers = [(text, weight) for text, weight in pairs if text.strip().isdigit()]
    assert label == ("7", 1.0)
    assert "".join(text for text, _ in numbers) == "745203999"
    assert [weight for _, weight in numbers] == [2.0, 2.0, 1.0, 2.0, 1.0, 0.2, 2.0, 1.0, 0.2]


def test_what_may_follow_the_same_digits_weighs_the_same(prepare: Processor) -> None:
    after = {}
    for x1 in (4, 45, 456):
        pairs = _weighed(prepare, box=(x1, 5, 600, 700), label="star")
        first = [text for text, _ in pairs].index("[[") + 1
        for place in range(len(str(x1)) + 1):
            after.setdefault(place, set()).add(pairs[first + place][1])
    assert after == {0: {2.0}, 1: {1.0}, 2: {0.2}, 3: {0.2}}


def _weighed(prepare: Processor, *, box: tuple[int, int, int, int], label: str) -> list[tuple[str, float]]:
    """Return the tokens of an answer with one box, each with its weight beside the label's."""
    turns = (
        Message("user", (Text("Where?"),)),
        Message("assistant", (Text(format_box(label, [box])),)),
    )
    encoded = prepare.encode(Conversation(turns), train=True)
    weights = weigh_answers(encoded, tokenizer=prepare.tokenizer).loss_weights
    assert weights is not None
    counted = weights > 0
    label_weight = weights[counted][0].item()
    return [
        (prepare.tokenizer.decode([token]), round(weight / label_weight, 2))
        for token, weight in zip(encoded.input_ids[counted].tolist(), weights[counted].tolist(), strict=True)
    ]


def _runs(mask: torch.Tensor) -> list[int]:
    """Return the lengths of stretches of equal values."""
    return torch.unique_consecutive(mask, return_counts=True)[1].tolist()


def test_samples_are_weighed_and_a_function_of_their_index(prepare: Processor) -> None:
    for source in (TextSource(prepare, 3, "seekvl-nano"), PictureSource(prepare, 3, 4)):
        first, again, other = source(6), source(6), source(8)
        assert torch.equal(first.input_ids, again.input_ids)
        assert first.input_ids.tolist() != other.input_ids.tolist()
        assert first.loss_weights is not None
        assert 0 < first.loss_weights[first.loss_weights > 0].min() < 1  # no answer is a single token


def test_a_model_is_taught_its_own_name(prepare: Processor) -> None:
    source = TextSource(prepare, 0, "seekvl-nano-moe")
    assert "I am seekvl-nano-moe, a tiny" in source(83).prompt


def test_what_draws_the_pictures_can_be_chosen(prepare: Processor) -> None:
    asked: list[tuple[int, int, str | None, int]] = []

    def draw(seed: int, index: int, *, kind: str | None, questions: int) -> Sample:
        asked.append((seed, index, kind, questions))
        return corpus.sample(seed, index, kind="read", questions=questions)

    source = PictureSource(prepare, 3, 2, draw)
    assert "Read" in source(4).prompt or "read" in source(4).prompt or "say" in source(4).prompt
    source(7)
    assert asked[0] == (3, 4, None, 2)
    assert asked[-1] == (3, 7, "count", 2)  # one in four is for counting
