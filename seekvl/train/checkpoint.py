"""Checkpoints of a run: one folder a step, whole or not there at all, from which the run goes on bit for bit.

run/step-00000500/model.safetensors   every parameter and buffer, by the names of the model
                  optimizer.pt        optimiser state and the random generators
                  state.json          step, skipped steps in a row, and the resolved settings of the run
"""

import contextlib
import json
import pickle
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from seekvl.runtime import SeekVLError
from seekvl.train.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is."""

    step: int
    """Complete optimiser steps."""
    skipped: int
    """Steps skipped in a row just before, because loss or gradient was not finite."""
    settings: dict[str, Any]
    """The resolved settings of the run, as JSON values."""


def step_folder(folder: Path, *, step: int) -> Path:
    """Return where the checkpoint after this many complete steps lies."""
    return folder / f"step-{step:08d}"


def latest(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step in a run's folder, None where there is none."""
    found = sorted(path for path in folder.glob("step-*") if path.is_dir())
    return found[-1] if found else None


def save(folder: Path, *, progress: Progress, model: nn.Module, optimizer: Optimizer, keep: int = 2) -> Path:
    """Write the checkpoint of a step and return its folder; afterwards only the newest `keep` remain.

    It is written beside its place and renamed: whatever stops the program, no half one appears.
    """
    target = step_folder(folder, step=progress.step)
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".step-", dir=folder))
    try:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        torch.save(
            {"optimizer": optimizer.state_dict(), "random": _random_state(model)}, part / "optimizer.pt"
        )
        text = {"step": progress.step, "skipped": progress.skipped, "settings": progress.settings}
        (part / "state.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        part.chmod(0o755)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _prune(folder, keep=keep)
    return target


def load(path: Path, *, model: nn.Module, optimizer: Optimizer, device: torch.device) -> Progress:
    """Put a checkpoint into model, optimiser and random generators, and return how far it is.

    Raises SeekVLError for a missing or broken file, and for tensors missing, left over or misshaped.
    """
    progress = read_progress(path)
    load_weights(path, model=model)
    file = path / "optimizer.pt"
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        random = state["random"]
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise _broken(file, error) from error
    torch.set_rng_state(random["cpu"].cpu())
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"].cpu(), device)
    return progress


def load_weights(path: Path, *, model: nn.Module) -> None:
    """Put only the weights of a checkpoint into a model, as the next stage of a recipe does.

    Raises SeekVLError for a missing or broken file, and for tensors missing, left over or misshaped.
    """
    file = path / "model.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _broken(file, error) from error
    own = model.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise SeekVLError(f"{file} lacks {len(missing)} tensors of the model, first {missing[0]}")
    if surplus := sorted(weights.keys() - own.keys()):
        raise SeekVLError(f"{file} has {len(surplus)} tensors the model does not know, first {surplus[0]}")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            raise SeekVLError(
                f"{file}: {name} is {tuple(weights[name].shape)}, the model has {tuple(tensor.shape)}"
            )
    model.load_state_dict(weights)


def read_progress(path: Path) -> Progress:
    """Return how far the run of a checkpoint was; SeekVLError for a missing or broken file."""
    file = path / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return Progress(step=state["step"], skipped=state["skipped"], settings=state["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(file, error) from error


def check_settings(progress: Progress, *, settings: dict[str, Any], path: Path) -> None:
    """Raise SeekVLError naming the first setting in which a checkpoint differs from the run to go on."""
    for name in sorted(progress.settings.keys() | settings.keys()):
        old, new = progress.settings.get(name), settings.get(name)
        if old != new:
            raise SeekVLError(f"{path} was trained with {name} {old}, this run has {new}; use another folder")


def _broken(file: Path, error: Exception) -> SeekVLError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return SeekVLError(
        f"checkpoint file {file} cannot be read: {reason}; remove its folder to go on from an older one"
    )


def _random_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _prune(folder: Path, *, keep: int) -> None:
    """Remove old checkpoints and what a killed run left; each is renamed first, so none is half there."""
    for path in sorted(path for path in folder.glob("step-*") if path.is_dir())[:-keep]:
        gone = folder / f".gone-{path.name}"
        path.rename(gone)
    for leftover in (*folder.glob(".gone-*"), *folder.glob(".step-*")):
        with contextlib.suppress(OSError):
            shutil.rmtree(leftover)
