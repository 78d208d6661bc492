import torch

from seekvl.models.vl import VL
from seekvl.processing.tokenizer import Tokenizer
from seekvl.recipes import nano
from seekvl.recipes.nano_encoders import COLOUR_NAMES, FORMS, cell_batches
from seekvl.recipes.nano_naming import NAMED, naming
from seekvl.train.optimizer import make_optimizer


def test_classes_are_said_in_words_of_their_own(tokenizer: Tokenizer) -> None:
    colours, forms, letters = naming(tokenizer).tokens
    assert [tokenizer.decode([token]) for token in colours[1:]] == [f" {name}" for name in COLOUR_NAMES]
    assert [tokenizer.decode([token]) for token in forms[1:]] == [f" {name}" for name in FORMS]
    assert "".join(tokenizer.decode([token]) for token in letters[1:]) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert len(NAMED) == 3


def test_the_adaptor_learns_to_name_and_nothing_else_moves(tokenizer: Tokenizer) -> None:
    model = VL(nano.MODEL)
    nano.initialise(model, seed=0)
    stage = nano.stage1()
    optimizer = make_optimizer(stage, model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = cell_batches(nano.IMAGE_CONFIG, batch_size=4, seed=0)(0)
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
