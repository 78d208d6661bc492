import logging

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from seekvl.engine.gpu import switch
from seekvl.engine.gpu.switch import LEVELS, SWITCH, Compiled, choose_gpu_level
from seekvl.runtime import SeekVLError


def test_a_level_is_named_by_the_environment_or_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(switch, "find_spec", lambda _name: object())
    assert [choose_gpu_level(device) for device in (cpu, cuda)] == [None, LEVELS[-1]]
    for name, wanted in (("off", [None, None]), ("eager", ["eager", "eager"]), ("graphs", [None, "graphs"])):
        monkeypatch.setenv(SWITCH, name)
        assert [choose_gpu_level(device) for device in (cpu, cuda)] == wanted
    assert choose_gpu_level(cuda, "eager") == "eager", "an argument wins"
    monkeypatch.setenv(SWITCH, "fastest")
    with pytest.raises(SeekVLError, match="SEEKVL_GPU='fastest' is unknown; use auto or one of off, eager"):
        choose_gpu_level(cpu)


def test_recording_wants_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(switch, "find_spec", lambda _name: None)
    assert choose_gpu_level(torch.device("cuda")) == "eager"
    with pytest.raises(SeekVLError, match="'graphs' needs the package triton; use eager or off"):
        choose_gpu_level(torch.device("cuda"), "graphs")


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_what_torch_cannot_compile_is_computed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_x: Tensor) -> Tensor:
        raise TorchDynamoException("no compiler here\nand much more")

    monkeypatch.setattr(torch, "compile", lambda *_args, **_options: refuse)
    switch.warn.cache_clear()
    one, other = Compiled(double), Compiled(double)
    with caplog.at_level(logging.WARNING):
        assert [one(torch.ones(1)).item() for _ in range(2)] == [2.0, 2.0]
        assert other(torch.ones(1)).item() == 2.0
    assert [record.message for record in caplog.records] == [
        "a GPU answers more slowly than it could, torch compiles nothing: no compiler here"
    ]


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        Compiled(double)()
