from pathlib import Path

import pytest
import torch

from seekvl.recipes import nano, nano_moe
from seekvl.recipes.nano_build import Build
from seekvl.runtime import SeekVLError


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_leaves_no_steps_is_refused(scale: float, tmp_path: Path) -> None:
    with pytest.raises(SeekVLError, match="above 0"):
        Build(folder=tmp_path, device=torch.device("cpu"), scale=scale)


def test_a_scale_shortens_steps_and_warm_ups_and_nothing_else(tmp_path: Path) -> None:
    start = Build(folder=tmp_path, device=torch.device("cpu"), scale=0.1)
    for stage in (nano.stage2(), nano_moe.stage2()):
        short = start.stage(stage)
        assert (short.steps, short.schedule.warmup) == (260, 10)
        assert short.language is not None
        assert (short.language.warmup, short.language.target) == (30, 0.1)
        assert (short.groups, short.bias_gamma, short.lr) == (stage.groups, stage.bias_gamma, stage.lr)
    whole = Build(folder=tmp_path, device=torch.device("cpu"))
    assert whole.stage(nano_moe.stage2()) is not None
    assert whole.stage(nano_moe.stage2()) == nano_moe.stage2()
