from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seekvl.corpus import nano as corpus
from seekvl.models.hybrid import Hybrid
from seekvl.models.vl import VL
from seekvl.models.vl2 import on_meta
from seekvl.processing.conversation import Conversation, Message, Text
from seekvl.processing.encode import Processor
from seekvl.processing.grounding import format_box
from seekvl.processing.pad_image import visual_tokens
from seekvl.processing.tokenizer import Tokenizer
from seekvl.recipes import nano
from seekvl.recipes.nano_encoders import Labeller
from seekvl.runtime import SeekVLError
from seekvl.train.stage import Stage, assign
from seekvl.weights.load import load_checkpoint


@pytest.fixture(scope="module")
def prepare(words: Path) -> Processor:
    return nano.processor(Tokenizer.from_file(words))


def test_nano_is_small_and_both_sides_count_the_same_visual_tokens() -> None:
    assert 2e6 < sum(p.numel() for p in on_meta(nano.MODEL).parameters()) < 6e6
    assert nano.MODEL.visual_tokens == visual_tokens(nano.IMAGE_CONFIG) == 100
    assert nano.MODEL.image_size == nano.IMAGE_CONFIG.image_size


def test_a_prompt_ends_as_the_trained_prefix_of_its_answer_begins(prepare: Processor) -> None:
    for index in range(20):
        conversation = corpus.sample(3, index, questions=1).conversation
        trained = prepare.encode(conversation, train=True)
        asked = prepare.encode(type(conversation)(conversation.messages[:-1]))
        assert trained.input_ids[: len(asked.input_ids)].tolist() == asked.input_ids.tolist()
        assert trained.loss_weights is not None
        assert trained.loss_weights.nonzero()[0].item() == len(asked.input_ids)


def test_every_stage_has_a_place_for_every_parameter() -> None:
    model = on_meta(nano.MODEL)
    for stage in (nano.language(), nano.stage1(), nano.stage2(), nano.stage3()):
        assert sum(map(len, assign(stage, model))) == len(list(model.parameters()))
    assert isinstance(model.vision, Hybrid)
    with torch.device("meta"):
        labeller = Labeller(model.vision)
    assert sum(map(len, assign(nano.encoders(), labeller))) == len(list(labeller.parameters()))


def learning(stage: Stage) -> set[str]:
    model = on_meta(nano.MODEL)
    lines = zip(stage.groups, assign(stage, model), strict=True)
    return {name.split(".")[1] if name.startswith("vision") else name.split(".")[0]
            for group, names in lines if not group.frozen for name in names}  # fmt: skip


def test_stages_train_what_the_paper_trains() -> None:
    assert learning(nano.stage1()) == {"adaptor"}
    assert learning(nano.stage2()) == {"adaptor", "high", "language"}
    assert learning(nano.stage3()) == {"adaptor", "high", "low", "language"}
    frozen = [group.pattern for group in nano.stage3().groups if group.frozen]
    assert frozen == [nano.TRUNK]


def test_initialisation_depends_on_the_seed_alone() -> None:
    first, again, other = (VL(nano.MODEL) for _ in range(3))
    nano.initialise(first, seed=1)
    torch.rand(100)
    nano.initialise(again, seed=1)
    nano.initialise(other, seed=2)
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.language.lm_head.weight, other.language.lm_head.weight)


STAGES = ("encoders", "language", "stage1", "stage2", "stage3")


def test_the_whole_recipe_runs_resumes_and_leaves_a_checkpoint_that_loads(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in STAGES:
        small = replace(getattr(nano, name)(), batch_size=2)
        monkeypatch.setattr(nano, name, lambda stage=small: stage)
    (tmp_path / "tokenizer.json").write_bytes(words.read_bytes())
    made = nano.build(tmp_path, device=torch.device("cpu"), workers=0, scale=1e-6)
    checkpoint = load_checkpoint(made)
    assert checkpoint.model.config == nano.MODEL
    assert checkpoint.processor.template == nano.TEMPLATE
    saved = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/step-*/*")}
    assert {path.parts[-3] for path in saved} == set(STAGES)
    nano.build(tmp_path, device=torch.device("cpu"), workers=0, scale=1e-6)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/step-*/*")} == saved
    with pytest.raises(SeekVLError, match="seed"):
        nano.build(tmp_path, device=torch.device("cpu"), workers=0, scale=1e-6, seed=5)


def test_a_scale_that_leaves_no_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SeekVLError, match="above 0"):
        nano.build(tmp_path, device=torch.device("cpu"), scale=0.0)


def test_long_answers_count_more_than_short_ones_but_not_by_their_length(prepare: Processor) -> None:
    encoded = prepare.encode(corpus.sample(0, 8, questions=5).conversation, train=True)
    weighed = nano.weigh_answers(encoded, tokenizer=prepare.tokenizer).loss_weights
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
    weights = nano.weigh_answers(encoded, tokenizer=prepare.tokenizer).loss_weights
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
