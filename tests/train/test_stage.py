from dataclasses import replace

import pytest

from seekvl.runtime import SeekVLError
from seekvl.train.optimizer import make_optimizer
from seekvl.train.schedule import Schedule
from seekvl.train.stage import Group, assign, table
from tests.train.conftest import tiny_vl, toy_stage

GROUPS = (
    Group(pattern="vision[.].*", frozen=True),
    Group(pattern="adaptor[.].*", lr=10.0),
    Group(pattern="language[.].*", weight_decay=0.1),
)


def test_every_parameter_has_one_line() -> None:
    names = assign(toy_stage(groups=GROUPS), tiny_vl())
    assert [sorted({name.split(".")[0] for name in line}) for line in names] == [
        ["vision"],
        ["adaptor"],
        ["language"],
    ]
    assert sum(map(len, names)) == len(list(tiny_vl().parameters()))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (GROUPS[:2], r"stage 'toy': parameter language[.]embed_tokens[.]weight matches no group"),
        (
            (*GROUPS, Group(pattern=".*norm.*")),
            r"parameter vision.*norm.* matches 'vision.*', '.*norm.*'; it must",
        ),
        ((*GROUPS, Group(pattern="langauge[.].*")), r"group 'langauge.*' matches no parameter"),
        ((Group(pattern=".*", frozen=True),), "every group is frozen"),
        ((), "matches no group"),
    ],
)
def test_tables_that_do_not_fit_are_refused(groups: tuple[Group, ...], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        assign(toy_stage(groups=groups), tiny_vl())


def test_optimizer_holds_what_learns_with_its_own_rate_and_decay() -> None:
    model = tiny_vl()
    optimizer = make_optimizer(toy_stage(groups=GROUPS), model)
    assert [(group["scale"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (10.0, 0.0),
        (1.0, 0.1),
    ]
    assert not any(parameter.requires_grad for parameter in model.vision.parameters())
    assert all(parameter.requires_grad for parameter in model.language.parameters())
    make_optimizer(toy_stage(groups=(Group(pattern=".*"),)), model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_table_shows_counts_bytes_and_rates() -> None:
    model = tiny_vl()
    text = table(toy_stage(groups=GROUPS, lr=1e-3), model)
    frozen, adaptor, language = text.splitlines()[2:]
    count = sum(parameter.numel() for parameter in model.adaptor.parameters())
    assert frozen.split()[-2:] == ["frozen", "-"]
    assert adaptor.split()[1:] == [f"{count:,}", f"{4 * count / 1e6:.2f}", "adamw", "1.00e-02", "0"]
    assert language.split()[-2:] == ["1.00e-03", "0.1"]


def test_table_says_how_router_biases_move() -> None:
    assert "cosine schedule, router bias by 0.001" in table(replace(toy_stage(), bias_gamma=0.001), tiny_vl())
    assert "bias" not in table(toy_stage(), tiny_vl())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"grad_clip": float("inf")}, "grad_clip is inf"),
        ({"bias_gamma": -0.001}, "bias_gamma is -0.001; it must be finite and not below 0"),
        ({"bias_gamma": float("nan")}, "bias_gamma is nan"),
        ({"schedule": Schedule(shape="cosine", warmup=13)}, "warm-up of 13 steps in 12 steps"),
    ],
)
def test_impossible_stages_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        replace(toy_stage(), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "(vision"}, "is no regular expression"),
        ({"pattern": "a", "lr": 0.0}, "to stop learning say frozen=True"),
        ({"pattern": "a", "weight_decay": -0.1}, "weight decay -0.1 not below"),
    ],
)
def test_impossible_groups_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        Group(**fields)
