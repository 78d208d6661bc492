from pathlib import Path

import pytest
import torch

from seekvl.runtime import SeekVLError
from seekvl.train import checkpoint
from seekvl.train.objective import next_token_loss
from seekvl.train.optimizer import make_optimizer
from seekvl.train.stage import Group
from seekvl.train.step import take_step
from tests.train.conftest import EXPERTS, Toy, tiny_vl, tiny_vl2, toy_stage

MATRICES = r"language[.]layers[.].*_proj[.]weight"
MUON = (
    Group(pattern=MATRICES, rule="muon", lr=2.0),
    Group(pattern=r"language[.](?!layers[.].*_proj[.]).*"),
    Group(pattern=r"(vision|adaptor)[.].*", frozen=True),
)


def test_groups_go_to_the_rule_they_name() -> None:
    model = tiny_vl()
    optimizer = make_optimizer(toy_stage(groups=MUON), model)
    names = [type(part).__name__ for part in optimizer.parts]
    assert names == ["AdamW", "Muon"]
    count = sum(len(group["params"]) for group in optimizer.parts[1].param_groups)
    assert count == sum("_proj" in name for name, _ in model.named_parameters())
    assert [group["scale"] for group in optimizer.param_groups] == [1.0, 2.0]


def test_without_muon_it_is_plain_adamw() -> None:
    stage = toy_stage()
    ours = tiny_vl()
    optimizer = make_optimizer(stage, ours)
    plain = tiny_vl()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(dict(ours.named_parameters())[name].requires_grad)
    adamw = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad],
        lr=1e-2,
        betas=stage.betas,
        eps=stage.eps,
        weight_decay=0.0,
    )
    for step in range(3):
        take_step(ours, Toy()(step), objective=next_token_loss, optimizer=optimizer, lr=1e-2, grad_clip=1e9)
        adamw.zero_grad()
        next_token_loss(plain, Toy()(step)).mean().backward()
        adamw.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_learns_and_resumes_with_the_same_losses(tmp_path: Path) -> None:
    stage = toy_stage(groups=MUON)
    model = tiny_vl()
    optimizer = make_optimizer(stage, model)

    def step(number: int) -> float:
        batch = Toy()(number)
        return take_step(
            model, batch, objective=next_token_loss, optimizer=optimizer, lr=1e-2, grad_clip=1.0
        ).loss

    begun = [step(number) for number in range(30)]
    progress = checkpoint.Progress(step=30, skipped=0, settings={})
    saved = checkpoint.save(tmp_path, progress=progress, model=model, optimizer=optimizer)
    went_on = [step(number) for number in range(30, 33)]
    assert went_on[0] < begun[0]
    model = tiny_vl(seed=1)
    optimizer = make_optimizer(stage, model)
    checkpoint.load(saved, model=model, optimizer=optimizer, device=torch.device("cpu"))
    assert [step(number) for number in range(30, 33)] == went_on


def test_muon_refuses_what_is_no_matrix() -> None:
    groups = (
        Group(pattern=r"language[.].*", rule="muon"),
        Group(pattern=r"(vision|adaptor)[.].*", frozen=True),
    )
    with pytest.raises(SeekVLError, match=r"muon is for matrices.*language"):
        make_optimizer(toy_stage(groups=groups), tiny_vl())


def test_stacks_of_experts_have_a_muon_of_their_own() -> None:
    model = tiny_vl2()
    optimizer = make_optimizer(toy_stage(groups=EXPERTS), model)
    assert [type(part).__name__ for part in optimizer.parts] == ["AdamW", "StackedMuon"]
    learning = [one for group in optimizer.param_groups for one in group["params"]]
    wanted = [one for one in model.parameters() if one.requires_grad]
    assert len(learning) == len(wanted) == len({id(one) for one in learning})
    mixed = (Group(pattern=r"language[.].*(_proj.*)", rule="muon", lr=2.0),)
    rest = (Group(pattern=r"(?!language[.].*_proj).*"),)
    optimizer = make_optimizer(toy_stage(groups=(*mixed, *rest)), model)
    assert [type(part).__name__ for part in optimizer.parts] == ["AdamW", "Muon", "StackedMuon"]
    assert [group["scale"] for group in optimizer.param_groups] == [1.0, 2.0, 2.0]
    dims = [{one.dim() for one in group["params"]} for group in optimizer.param_groups[1:]]
    assert dims == [{2}, {3}]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(SeekVLError, match="'sgd' is unknown"):
        Group(pattern=".*", rule="sgd")  # type: ignore[arg-type]
