import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import seekvl
from seekvl.corpus import nano as corpus
from seekvl.models.moe import ALIGNMENT, Moe
from seekvl.models.vl import VL
from seekvl.models.vl2 import VL2, on_meta
from seekvl.processing.encode import Processor
from seekvl.processing.tile_image import visual_tokens
from seekvl.recipes import nano_moe
from seekvl.recipes.nano_build import Build
from seekvl.recipes.nano_encoders import Labeller
from seekvl.recipes.nano_initialise import initialise
from seekvl.recipes.nano_sources import PictureSource, TextSource
from seekvl.runtime import SeekVLError
from seekvl.train import checkpoint
from seekvl.train.metrics import read_log
from seekvl.train.objective import next_token_loss
from seekvl.train.optimizer import make_optimizer
from seekvl.train.stage import Stage, assign
from seekvl.train.step import take_step
from seekvl.train.streams import Streams
from seekvl.weights.load import BUNDLED, NANO, NANO_MOE, load_checkpoint

STAGES = (nano_moe.language, nano_moe.stage1, nano_moe.stage2, nano_moe.stage3)
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def prepare(moe_words: Path) -> Processor:
    return nano_moe.processor(nano_moe.open_words(moe_words))


def test_it_fits_in_15_megabytes_of_float16() -> None:
    model = on_meta(nano_moe.MODEL)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 5e6 < total <= 7.4e6
    experts = [
        stack for block in model.modules() if isinstance(block, Moe) for stack in block.experts.parameters()
    ]
    moe = nano_moe.MODEL.language.moe
    assert moe is not None
    idle = sum(stack.numel() for stack in experts) * (moe.experts - moe.active) // moe.experts
    assert round((total - idle) / 1e6, 1) == 3.4  # as the recipe says


def test_every_width_suits_the_grouped_product() -> None:
    language = nano_moe.MODEL.language
    assert language.moe is not None
    for width in (language.width, language.moe.width):
        assert width * torch.bfloat16.itemsize % ALIGNMENT == 0


def test_both_sides_count_the_same_visual_tokens() -> None:
    image = nano_moe.IMAGE_CONFIG
    assert nano_moe.MODEL.image_size == image.image_size
    assert nano_moe.MODEL.view_side == image.view_side == 5
    assert max(columns * rows for columns, rows in image.grids) == 6
    assert len(image.grids) == len({*image.grids}) == 14  # all of up to six tiles
    slots = [nano_moe.MODEL.slots(grid) for grid in image.grids]
    assert slots == [visual_tokens(grid, image) for grid in image.grids]
    assert (min(slots), max(slots)) == (61, 211)
    assert 2 * max(slots) + 300 < nano_moe.LENGTHS[-1] <= nano_moe.MODEL.language.max_positions


def test_every_stage_has_one_place_for_every_parameter() -> None:
    model = on_meta(nano_moe.MODEL)
    for make in STAGES:
        assert sum(map(len, assign(make(), model))) == len(list(model.parameters()))
    with torch.device("meta"):
        labeller = Labeller(model.vision)
    assert sum(map(len, assign(nano_moe.encoders(), labeller))) == len(list(labeller.parameters()))


def rates(stage: Stage) -> dict[str, set[tuple[str, float]]]:
    """Return rule and multiplier of what learns, by part."""
    found: dict[str, set[tuple[str, float]]] = {}
    for group, names in zip(stage.groups, assign(stage, on_meta(nano_moe.MODEL)), strict=True):
        for name in names if not group.frozen else []:
            found.setdefault(name.partition(".")[0], set()).add((group.rule, group.lr))
    return found


def test_stages_train_what_the_paper_trains() -> None:
    rows = {"adaptor", "image_newline", "view_separator"}
    assert set(rates(nano_moe.language())) == {"language"}
    assert set(rates(nano_moe.stage1())) == {"vision", *rows}
    for stage in (nano_moe.stage2(), nano_moe.stage3()):
        assert set(rates(stage)) == {"vision", "language", *rows}
        assert rates(stage)["vision"] == {("muon", 0.2), ("adamw", 0.1)}  # a tenth of 2 and of 1
        assert rates(stage)["language"] == {("muon", 2.0), ("adamw", 1.0)}
        frozen = [group for group in stage.groups if group.frozen]
        assert frozen == [nano_moe.ROUTER_BIAS]
    gammas = [make().bias_gamma or 0 for make in (nano_moe.stage1, nano_moe.stage2, nano_moe.stage3)]
    assert gammas == [0, 0.001, 0]


def test_the_experts_learn_with_muon_as_stacks() -> None:
    model = VL2(nano_moe.MODEL)
    parts = make_optimizer(nano_moe.stage2(), model).parts
    assert [type(part).__name__ for part in parts] == ["AdamW", "Muon", "StackedMuon"]
    shapes = {tuple(one.shape) for group in parts[2].param_groups for one in group["params"]}
    assert shapes == {(16, 128, 192), (16, 192, 128)}


def test_a_prompt_ends_as_the_trained_prefix_of_its_answer_begins(prepare: Processor) -> None:
    for index in range(12):
        conversation = corpus.sample(3, index, questions=1).conversation
        trained = prepare.encode(conversation, train=True)
        asked = prepare.encode(type(conversation)(conversation.messages[:-1]))
        assert trained.input_ids[: len(asked.input_ids)].tolist() == asked.input_ids.tolist()
        assert trained.loss_weights is not None
        assert trained.loss_weights.nonzero()[0].item() == len(asked.input_ids)


def test_a_step_learns_and_moves_the_bias_towards_balance(prepare: Processor) -> None:
    model = VL2(nano_moe.MODEL)
    initialise(model, seed=0)
    stage = nano_moe.stage2()
    optimizer = make_optimizer(stage, model)
    streams = Streams(
        batch_size=2, lengths=nano_moe.LENGTHS, pad_id=prepare.tokenizer.pad_id,
        multimodal=PictureSource(prepare, 1, 2),
    )  # fmt: skip
    batch = streams(0)
    assert batch.grids is not None
    record = next_token_loss(model, batch).record
    assert record is not None
    result = take_step(
        model, batch, objective=next_token_loss, optimizer=optimizer, lr=1e-3, grad_clip=1.0,
        precision="bfloat16", bias_gamma=stage.bias_gamma,
    )  # fmt: skip
    assert result.expert_load is not None
    assert 1 < result.expert_load <= 4
    for layer, load in record.loads.items():
        gate = model.language.layers[layer].mlp.gate
        assert gate.bias.dtype == torch.float32
        expected = 0.001 * torch.sign(load.float().mean() - load)
        wrong = (gate.bias - expected).abs() > 1e-9
        assert wrong.sum() <= 2  # experts whose loads lie at the mean may differ under bfloat16
    later = take_step(
        model, batch, objective=next_token_loss, optimizer=optimizer, lr=1e-3, grad_clip=1.0,
        precision="bfloat16", bias_gamma=stage.bias_gamma,
    )  # fmt: skip
    assert later.loss < result.loss


def test_the_tower_is_that_of_the_bundled_model_of_the_first_family(monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = load_checkpoint(NANO, device="cpu", dtype="float32").model
    tower = nano_moe.inherited_tower()
    assert isinstance(bundled, VL)
    for (name, ours), theirs in zip(tower.named_parameters(), bundled.vision.low.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    other = replace(nano_moe.MODEL, vision=replace(nano_moe.MODEL.vision, layers=5))
    monkeypatch.setattr(nano_moe, "MODEL", other)
    with pytest.raises(SeekVLError, match="the SigLIP tower of seekvl-nano is"):
        nano_moe.inherited_tower()


def small(make: Callable[[], Stage]) -> Callable[[], Stage]:
    stage = replace(make(), batch_size=1 if make is nano_moe.stage3 else 2)
    return lambda: stage


def test_the_whole_recipe_runs_resumes_and_leaves_a_model_that_answers(
    moe_words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("encoders", "language", "stage1", "stage2", "stage3")
    for name in names:
        monkeypatch.setattr(nano_moe, name, small(getattr(nano_moe, name)))
    taught: list[str] = []

    def text_source(processor: Processor, seed: int, name: str) -> TextSource:
        taught.append(name)
        return TextSource(processor, seed, name)

    monkeypatch.setattr(nano_moe, "TextSource", text_source)
    (tmp_path / "tokenizer.json").write_bytes(moe_words.read_bytes())
    start = Build(folder=tmp_path, device=torch.device("cpu"), workers=0, scale=1e-6)
    made = nano_moe.build(start)
    assert made == tmp_path / "seekvl-nano-moe"
    assert taught == ["seekvl-nano-moe"]
    saved = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/step-*/*")}
    assert {path.parts[-3] for path in saved} == set(names)
    loads = {name: read_log(tmp_path / name / "log.jsonl")[0].expert_load for name in names}
    assert [loads[name] is None for name in names] == [True, False, True, False, False]
    last = checkpoint.latest(tmp_path / "stage2")
    assert last is not None
    settings = json.loads((last / "state.json").read_text())["settings"]
    assert settings["stage.bias_gamma"] == 0.001
    assert sum(path.stat().st_size for path in made.glob("*.safetensors")) < 15e6
    nano_moe.build(start)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/step-*/*")} == saved
    vlm = seekvl.load(made, device="cpu")
    assert vlm.config == nano_moe.MODEL
    assert vlm.processor.image == nano_moe.IMAGE_CONFIG
    answer = vlm.ask(corpus.scene(0, 1).image, "What is in the picture?", max_new_tokens=3)
    assert answer.usage.completion_tokens <= 3
    assert answer.usage.image_tokens in {nano_moe.MODEL.slots(grid) for grid in nano_moe.IMAGE_CONFIG.grids}


@pytest.fixture(scope="module")
def bundled() -> seekvl.VLM:
    return seekvl.load(NANO_MOE, device="cpu")


def test_the_bundled_model_is_the_recipes(bundled: seekvl.VLM) -> None:
    assert isinstance(bundled.model, VL2)
    assert bundled.config == nano_moe.MODEL
    assert bundled.processor.image == nano_moe.IMAGE_CONFIG
    size = sum(path.stat().st_size for path in BUNDLED[NANO_MOE].iterdir())
    assert size <= 15_000_000


def test_it_looks_at_a_long_picture_in_tiles(bundled: seekvl.VLM) -> None:
    strip = Image.new("RGB", (160, 900), "white")
    answer = bundled.ask(strip, "What colour is the background?", max_new_tokens=4)
    assert answer.usage.image_tokens == visual_tokens((1, 6), nano_moe.IMAGE_CONFIG) == 211


def test_it_counts_the_shapes_of_the_example(bundled: seekvl.VLM) -> None:
    assert bundled.ask(EXAMPLES / "shapes.png", "How many shapes are there?").text == "5"
