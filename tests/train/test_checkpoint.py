from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seekvl.models.vl import VL
from seekvl.runtime import SeekVLError
from seekvl.train import checkpoint
from seekvl.train.checkpoint import Progress
from seekvl.train.objective import next_token_loss
from seekvl.train.optimizer import make_optimizer
from seekvl.train.step import take_step
from tests.train.conftest import LANGUAGE, Toy, tiny_vl, toy_stage

CPU = torch.device("cpu")


def trained(folder: Path, *, step: int = 1, keep: int = 2) -> tuple[VL, Path]:
    model = tiny_vl()
    optimizer = make_optimizer(toy_stage(groups=LANGUAGE), model)
    take_step(model, Toy()(0), objective=next_token_loss, optimizer=optimizer, lr=1e-3, grad_clip=1.0)
    progress = Progress(step=step, skipped=3, settings={"seed": 7})
    return model, checkpoint.save(folder, progress=progress, model=model, optimizer=optimizer, keep=keep)


def load(path: Path) -> Progress:
    model = tiny_vl(seed=4)
    return checkpoint.load(path, model=model, optimizer=make_optimizer(toy_stage(), model), device=CPU)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model, path = trained(tmp_path)
    expected = torch.rand(3)
    _, path = trained(tmp_path / "again")
    torch.manual_seed(1)
    assert load(path) == Progress(step=1, skipped=3, settings={"seed": 7})
    other = tiny_vl(seed=9)
    optimizer = make_optimizer(toy_stage(), other)
    checkpoint.load(path, model=other, optimizer=optimizer, device=CPU)
    again = torch.rand(3)
    checkpoint.load(path, model=other, optimizer=optimizer, device=CPU)
    assert torch.equal(torch.rand(3), again)
    assert expected.shape == again.shape
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert optimizer.parts[0].state[other.language.norm.weight]["step"] == 1


def test_broken_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    trained(tmp_path, step=1)
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_newest_is_found_by_number_and_old_ones_go(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / ".step-killed").mkdir()
    for step in (9, 10, 100):
        trained(tmp_path, step=step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000100"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_broken_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    _, path = trained(tmp_path)
    file = path / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40] if damage == "truncated" else b"")
    with pytest.raises(SeekVLError, match=f"checkpoint file .*{name} cannot be read") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("language.norm.weight"),
            "lacks 1 tensors of the model, first language.norm",
        ),
        (
            lambda tensors: tensors.update(extra=torch.zeros(1)),
            "has 1 tensors the model does not know, first extra",
        ),
        (
            lambda tensors: tensors.update({"language.norm.weight": torch.zeros(5)}),
            r"language.norm.weight is \(5,\), the model has \(32,\)",
        ),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, change: object, message: str) -> None:
    _, path = trained(tmp_path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(SeekVLError, match=message):
        load(path)
