from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seekvl.corpus import nano as corpus
from seekvl.models.hybrid import Hybrid
from seekvl.models.vl2 import on_meta
from seekvl.processing.encode import Processor
from seekvl.processing.pad_image import visual_tokens
from seekvl.processing.tokenizer import Tokenizer
from seekvl.recipes import nano
from seekvl.recipes.nano_build import Build
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


STAGES = ("encoders", "language", "stage1", "stage2", "stage3")


def test_the_whole_recipe_runs_resumes_and_leaves_a_checkpoint_that_loads(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in STAGES:
        small = replace(getattr(nano, name)(), batch_size=2)
        monkeypatch.setattr(nano, name, lambda stage=small: stage)
    (tmp_path / "tokenizer.json").write_bytes(words.read_bytes())
    start = Build(folder=tmp_path, device=torch.device("cpu"), workers=0, scale=1e-6)
    made = nano.build(start)
    checkpoint = load_checkpoint(made)
    assert checkpoint.model.config == nano.MODEL
    assert checkpoint.processor.template == nano.TEMPLATE
    saved = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/step-*/*")}
    assert {path.parts[-3] for path in saved} == set(STAGES)
    nano.build(start)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/step-*/*")} == saved
    with pytest.raises(SeekVLError, match="seed"):
        nano.build(replace(start, seed=5))
