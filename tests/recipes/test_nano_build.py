from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seekvl.engine.kernels import accelerate as room
from seekvl.engine.kernels.compiled import missing
from seekvl.models.vl2 import VL2
from seekvl.recipes import nano, nano_moe
from seekvl.recipes.nano_build import Build, run_stage
from seekvl.runtime import SeekVLError
from seekvl.train.loop import Moment, RunInterruptedError
from seekvl.train.metrics import read_log
from seekvl.train.objective import next_token_loss
from tests.train.conftest import EXPERTS, Toy, tiny_vl2, toy_stage


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_leaves_no_steps_is_refused(scale: float, tmp_path: Path) -> None:
    with pytest.raises(SeekVLError, match="above 0"):
        Build(folder=tmp_path, device=torch.device("cpu"), scale=scale)


def test_a_scale_shortens_steps_and_warm_ups_and_nothing_else(tmp_path: Path) -> None:
    start = Build(folder=tmp_path, device=torch.device("cpu"), scale=0.1)
    for stage in (nano.stage2(), nano_moe.stage2()):
        short = start.stage(stage)
        assert (short.steps, short.schedule.warmup) == (stage.steps // 10, 10)
        assert short.language is not None
        assert (short.language.warmup, short.language.target) == (30, 0.1)
        assert (short.groups, short.bias_gamma, short.lr) == (stage.groups, stage.bias_gamma, stage.lr)
    whole = Build(folder=tmp_path, device=torch.device("cpu"))
    assert whole.stage(nano_moe.stage2()) is not None
    assert whole.stage(nano_moe.stage2()) == nano_moe.stage2()


def learn_toy(folder: Path, *, model: VL2, stop: int | None = None) -> list[float]:
    """Train the toy of tests/train through `run_stage`, return its losses."""

    def hook(moment: Moment) -> None:
        if moment.step == stop:
            raise KeyboardInterrupt

    start = Build(folder=folder, device=torch.device("cpu"), workers=0, threads=1, hooks=(hook,))
    stage = replace(toy_stage(8), groups=EXPERTS, bias_gamma=0.01)
    run_stage(start, model, stage=stage, batch=Toy(), objective=next_token_loss)
    return [record.loss for record in read_log(folder / "toy" / "log.jsonl")]


@pytest.mark.skipif(missing() is not None, reason="no kernels")
def test_experts_of_a_stage_learn_through_the_kernels_and_go_on_with_equal_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if room.choose_level() not in room.LEARNING:
        pytest.skip("torch is faster on this machine")
    calls: list[torch.dtype] = []
    learning = room.raw_learning_experts

    def counted(x: torch.Tensor, *rest: torch.Tensor, **more: object) -> torch.Tensor:
        calls.append(x.dtype)
        return learning(x, *rest, **more)

    monkeypatch.setattr(room, "raw_learning_experts", counted)
    whole = tiny_vl2()
    losses = learn_toy(tmp_path / "whole", model=whole)
    assert calls == [torch.bfloat16] * 8
    with pytest.raises(RunInterruptedError):
        learn_toy(tmp_path / "broken", model=tiny_vl2(), stop=3)
    again = tiny_vl2(seed=99)
    assert learn_toy(tmp_path / "broken", model=again) == losses
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
