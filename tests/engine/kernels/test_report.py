import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seekvl.engine.kernels import compiled as room
from seekvl.engine.kernels import report, towers
from seekvl.engine.kernels.accelerate import MOST_ROWS
from seekvl.engine.kernels.compiled import SWITCH, Library
from seekvl.engine.kernels.decoder import decode
from seekvl.engine.kernels.packed import packed_linear
from seekvl.engine.kernels.products import linear
from seekvl.engine.kernels.prompts import prompt_hidden, prompt_logits
from seekvl.engine.kernels.report import compare_with_torch
from seekvl.models.deepseek_v2 import DeepseekV2
from seekvl.models.quantized import QuantizedLinear
from seekvl.runtime import SeekVLError


def test_it_names_the_level_and_the_difference(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, level)
    said = compare_with_torch()
    assert said.startswith(f"{level} of portable")
    product, *whole = (float(number) for number in re.findall(r"(\S+) in a", said))
    assert 0 < product < 1e-3
    assert all(0 < difference < report.STEP_LIMIT for difference in whole)
    assert len(whole) == (5 if level in MOST_ROWS else 2)
    left = "; torch computes a prompt, a quantised prompt, a vision tower"
    assert said.endswith("in a vision tower" if level in MOST_ROWS else left)


def test_it_says_why_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "PATH", tmp_path / "native.so")
    room.library.cache_clear()
    try:
        monkeypatch.delenv(SWITCH, raising=False)
        assert "torch computes: the CPU kernels were not compiled" in compare_with_torch()
    finally:
        room.library.cache_clear()


def test_switched_off(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert compare_with_torch() == "torch computes: SEEKVL_KERNELS=off"


def test_a_wrong_product_is_an_error(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(report, "linear", lambda *args, **more: linear(*args, **more) + 0.1)
    with pytest.raises(SeekVLError, match=r"differs by 1\.0e-01 from torch in a product, at"):
        compare_with_torch()


def test_a_wrong_step_is_an_error(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **more: Any) -> Tensor:
        logits = decode(*args, **more)
        assert logits is not None
        logits[-1, 7] = torch.nan
        return logits

    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(report, "decode", wrong)
    with pytest.raises(SeekVLError, match="differs by nan from torch in a decoding step, at most 1e-05"):
        compare_with_torch()


@pytest.mark.parametrize(
    ("size", "rows", "says"),
    [
        (1e-3, slice(None), "in a decoding step of int8, at most 1e-05"),
        (0.2, 0, "in a row of a decoding step of int8"),
    ],
)
def test_a_wrong_quantised_step_is_an_error(
    size: float, rows: slice | int, says: str, native: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: DeepseekV2, *args: Any, **more: Any) -> Tensor:
        logits = decode(network, *args, **more)
        assert logits is not None
        if isinstance(network.lm_head, QuantizedLinear):
            logits[rows] += size
        return logits

    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(report, "decode", wrong)
    with pytest.raises(SeekVLError, match=says):
        compare_with_torch()


def test_a_wrong_prompt_is_an_error(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **more: Any) -> Tensor:
        logits = prompt_logits(*args, **more)
        assert logits is not None
        return logits + 1e-3

    if native.levels[-1] not in MOST_ROWS:
        pytest.skip("torch reads prompts on this machine")
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(report, "prompt_logits", wrong)
    with pytest.raises(SeekVLError, match=r"differs by 1\.0e-03 from torch in a prompt, at most 1e-05"):
        compare_with_torch()


@pytest.mark.parametrize(
    ("size", "tokens", "says"),
    [
        (1e-3, slice(None), "in a prompt of int8, at most 1e-05"),
        (0.2, -1, "in a token of a prompt of int8"),
    ],
)
def test_a_wrong_quantised_prompt_is_an_error(
    size: float, tokens: slice | int, says: str, native: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **more: Any) -> Tensor:
        hidden = prompt_hidden(*args, **more)
        assert hidden is not None
        hidden[tokens] += size
        return hidden

    if native.levels[-1] not in MOST_ROWS:
        pytest.skip("torch reads prompts on this machine")
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(report, "prompt_hidden", wrong)
    with pytest.raises(SeekVLError, match=says):
        compare_with_torch()


def test_a_wrong_tower_is_an_error(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.levels[-1] not in MOST_ROWS:
        pytest.skip("torch computes vision towers on this machine")
    monkeypatch.delenv(SWITCH, raising=False)
    see = towers._see
    for added, said in ((1e-3, r"1\.0e-03"), (torch.nan, "nan")):
        monkeypatch.setattr(towers, "_see", lambda *args, added=added, **more: see(*args, **more) + added)
        with pytest.raises(
            SeekVLError, match=rf"differs by {said} from torch in a vision tower, at most 1e-05"
        ):
            compare_with_torch()


def test_a_wrong_quantised_product_is_an_error(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(report, "packed_linear", lambda *args, **more: packed_linear(*args, **more) + 0.5)
    with pytest.raises(SeekVLError, match=r"differs by 5\.0e-01 from torch in a product of int8, at"):
        compare_with_torch()


def test_a_difference_that_is_no_number_is_told(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    found = iter((torch.tensor([0.0]), torch.tensor([torch.nan])))
    monkeypatch.setattr(report, "step_differences", lambda *_, **__: next(found))
    with pytest.raises(SeekVLError, match="a decoding step"):
        compare_with_torch()
