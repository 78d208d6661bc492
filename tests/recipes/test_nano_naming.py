from pathlib import Path

import torch

from seekvl.corpus import nano as corpus
from seekvl.models.vl import VL
from seekvl.models.vl2 import VL2
from seekvl.processing.tokenizer import Tokenizer
from seekvl.recipes import nano, nano_moe
from seekvl.recipes.nano_encoders import COLOUR_NAMES, FORMS, cell_batches
from seekvl.recipes.nano_initialise import initialise
from seekvl.recipes.nano_naming import NAMED, adapted, naming
from seekvl.recipes.nano_views import Squares, Tiles
from seekvl.train.optimizer import make_optimizer


def test_classes_are_said_in_words_of_their_own(tokenizer: Tokenizer) -> None:
    colours, forms, letters = naming(tokenizer).tokens
    assert [tokenizer.decode([token]) for token in colours[1:]] == [f" {name}" for name in COLOUR_NAMES]
    assert [tokenizer.decode([token]) for token in forms[1:]] == [f" {name}" for name in FORMS]
    assert "".join(tokenizer.decode([token]) for token in letters[1:]) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert len(NAMED) == 3


def test_the_adaptor_learns_to_name_and_nothing_else_moves(tokenizer: Tokenizer) -> None:
    model = VL(nano.MODEL)
    initialise(model, seed=0)
    stage = nano.stage1()
    optimizer = make_optimizer(stage, model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = cell_batches(Squares(nano.IMAGE_CONFIG), batch_size=4, seed=0, draw=corpus.scene)(0)
    objective = naming(tokenizer)
    losses = []
    for _ in range(8):
        loss = objective(model, batch)
        assert loss.weight == 4
        losses.append(loss.mean().item())
        optimizer.zero_grad()
        loss.mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 5e-3
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all(name.startswith("adaptor.") for name in moved)


def test_features_of_tiles_are_those_that_stand_among_words() -> None:
    model = VL2(nano_moe.MODEL)
    initialise(model, seed=0)
    g = nano_moe.MODEL.view_side
    pixels = torch.rand(1, 3, 160, 160)
    rows = model.encode_pictures(pixels, grids=[(1, 1)])
    whole = rows[: g * (g + 1)].view(g, g + 1, -1)[:, :g].flatten(0, 1)
    torch.testing.assert_close(adapted(model, pixels)[0], whole)


def test_tower_and_adaptor_learn_to_name_what_tiles_show(moe_words: Path) -> None:
    model = VL2(nano_moe.MODEL)
    initialise(model, seed=0)
    optimizer = make_optimizer(nano_moe.stage1(), model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    look = Tiles(nano_moe.IMAGE_CONFIG, nano_moe.MODEL.view_side)
    batch = cell_batches(look, batch_size=2, seed=0, draw=corpus.scene)(0)
    objective = naming(nano_moe.open_words(moe_words))
    losses = []
    for _ in range(5):
        loss = objective(model, batch)
        assert loss.weight == 2
        losses.append(loss.mean().item())
        optimizer.zero_grad()
        loss.mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * group["scale"]
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.partition(".")[0] for name in moved} == {"adaptor", "vision"}
