"""How fast a model answers on this machine, what share of the machine's ceilings that is, and beside a peer.

Load, vision, prefill and decoding are measured, each program in processes of its own, in alternation, and
memory read and matrix products before each of them and at the end. Nothing of a peer is timed before it has
shown that it computes the same (`evals.peers.disagreement`). Beside llama.cpp, which is given the language
model alone, there is no picture, and quantised weights are compared with its own formats after both have
computed the same with plain ones.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch

from seekvl import __version__
from seekvl.engine.plan import find_config, plan_pictures
from seekvl.evals.ceilings import Ceilings, best_of, measure_ceilings
from seekvl.evals.gguf import FORMATS, write_gguf
from seekvl.evals.machine import device_name, fill_page_cache, wait_until_quiet
from seekvl.evals.random_weights import quantise_beside, write_random
from seekvl.evals.speed_process import PICTURE, Job, Measured, Side
from seekvl.evals.speed_report import Figure, Report, decode, memory, works
from seekvl.models.cost import parameters
from seekvl.models.llama import Llama
from seekvl.models.quantized import Kind
from seekvl.models.vl2 import VL2Config
from seekvl.presets import CHECKPOINTS, SHORT_NAMES
from seekvl.runtime import DTYPES, SeekVLError, require, select_device, select_dtype
from seekvl.weights.config import CheckpointConfig
from seekvl.weights.load import BUNDLED, choose_format, find_folder, load_checkpoint
from seekvl.weights.save import save_checkpoint

Peer: TypeAlias = Literal["transformers", "llama.cpp"]

PACKAGES: dict[Peer, tuple[str, ...]] = {
    "transformers": ("transformers",),
    "llama.cpp": ("llama_cpp", "gguf"),
}
"""What a peer is imported from, itself first."""
EXTRAS: dict[Peer, str] = {"transformers": "transformers", "llama.cpp": "llama"}
"""What brings them."""

BATCHES = (1, 4, 16)
"""Answers decoded together by default."""

Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to measure."""

    dtype: str = "auto"
    device: str = "cpu"
    """The CPU or a CUDA device."""
    quantize: str | None = None
    """Format that the weights are written in first; None measures them as they are."""
    threads: int
    """CPU threads of each program."""
    batches: tuple[int, ...] = ()
    """Answers decoded together; 1 is always among them. None named are those of `BATCHES`, beside llama.cpp
    1 alone.
    """
    tokens: int = 32
    """Tokens of every answer."""
    rounds: int = 3
    """Processes of each program; figures are their medians."""
    quiet: float = 20.0
    """Seconds to wait before each process until others use next to nothing."""
    peer: Peer | None = None

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("tokens", 2), ("rounds", 1), ("quiet", 0)):
            if not getattr(self, name) >= least:
                raise SeekVLError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for rows in self.batches:
            if rows < 1:
                raise SeekVLError(f"a batch must have at least 1 answer, not {rows}")
        if self.peer not in (None, *get_args(Peer)):
            raise SeekVLError(f"peer {self.peer!r} is unknown; use {' or '.join(get_args(Peer))}")
        if self.peer == "transformers" and self.quantize is not None:
            raise SeekVLError(
                f"transformers computes with plain weights: measure {self.quantize} without a peer, or "
                "beside llama.cpp"
            )
        if self.peer == "llama.cpp" and not {1}.issuperset(self.batches):
            raise SeekVLError("llama.cpp is measured with one answer at a time: leave larger batches out")
        named = self.batches or (BATCHES if self.peer != "llama.cpp" else ())
        object.__setattr__(self, "batches", tuple(sorted({1, *named})))


def bench(name: str, settings: Settings, *, folder: Path | None = None, say: Say) -> Report:
    """Measure a bundled model, a folder, or a published name, of which random weights are made; nothing is
    downloaded.

    folder: keeps the random weights of a published name, and quantised ones beside it, and takes them from
    there the next time.
    say: is told what is done now.

    Raises SeekVLError for what cannot be loaded or measured, for a peer that lacks the model or its package,
    and for one that computes something else.
    """
    config, kept = find_config(name), _kept(name, folder)
    device = _device(settings)
    kind = choose_format(config, settings.quantize, device=device)
    if settings.peer is not None:
        _require_peer(settings.peer, name, config)
    numbers = sum(parameters(config.model).values())
    dtype = select_dtype(settings.dtype, device=device, parameters=numbers)
    settings = replace(settings, dtype=str(dtype).removeprefix("torch."), device=str(device))
    with tempfile.TemporaryDirectory(prefix="seekvl-bench-") as made:
        scratch = Path(made)
        model = _weights(
            name, config, kept or scratch / "weights", settings=settings, scratch=scratch, say=say
        )
        plain, file = model, None
        if settings.quantize is not None and kind is not None and config.quantization is None:
            say(f"writing the weights in {kind}, unless they are there")
            target = None if kept is not None else scratch / kind
            model = str(quantise_beside(find_folder(plain), kind, dtype=settings.dtype, target=target))
        if settings.peer == "llama.cpp":
            file = _gguf(plain, None, settings=settings, scratch=scratch, say=say)
        if settings.peer is not None:
            _compare(plain, settings, file=file, scratch=scratch, say=say)
        if file is not None and kind is not None:
            file.unlink()
            file = _gguf(plain, kind, settings=settings, scratch=scratch, say=say)
        runs, ceilings = _alternate(model, settings, file=file, say=say)
    ours = runs["seekvl"]
    peer = None if settings.peer is None else runs[settings.peer]
    busy = [measured.neighbours for side in runs.values() for measured in side]
    report = Report(
        model=name,
        weights="bundled" if name in BUNDLED else "random" if _published(name) else "folder",
        dtype=settings.dtype,
        quantize=kind,
        level=ours[-1].level,
        device=device.type,
        machine=device_name(device),
        versions=_versions(settings.peer),
        rounds=settings.rounds,
        tokens=settings.tokens,
        prompt_tokens=ours[-1].prompt_tokens,
        image_tokens=ours[-1].image_tokens,
        neighbours=(statistics.mean(busy), max(busy)),
        peer=settings.peer,
        ceilings=best_of(ceilings),
        figures=(),
    )
    return replace(report, figures=_figures(report, ours, peer, config=config, batches=settings.batches))


def _device(settings: Settings) -> torch.device:
    """Return what computes."""
    device = select_device(settings.device)
    if device.type not in ("cpu", "cuda"):
        raise SeekVLError(f"the CPU or a CUDA device is measured, not {device}")
    if settings.peer == "llama.cpp" and device.type != "cpu":
        raise SeekVLError(f"llama.cpp is measured on the CPU, not on {device}; use device='cpu'")
    return device


def _published(name: str) -> str | None:
    """Return the hub id of a published checkpoint, unless the name is that of a folder."""
    text = SHORT_NAMES.get(name, name)
    return text if text in CHECKPOINTS and not Path(name).is_dir() else None


def _kept(name: str, folder: Path | None) -> Path | None:
    """Return the folder that keeps random weights; refuse one where there are none to keep, or others."""
    if folder is None:
        return None
    published = _published(name)
    if published is None:
        raise SeekVLError(
            f"folder {folder} is for the random weights of a published name; {name} has its own"
        )
    if not (folder / "config.json").exists():
        return folder
    found = find_config(folder)
    if found.model != CHECKPOINTS[published].model:
        raise SeekVLError(f"{folder} holds another model than {name}; choose another folder")
    return folder


def _weights(
    name: str, config: CheckpointConfig, folder: Path, *, settings: Settings, scratch: Path, say: Say
) -> str:
    """Return the model that all processes load, after making what is not there yet."""
    published = _published(name)
    if published is not None:
        if not (folder / "config.json").exists():
            say(f"writing random weights of {name}")
            write_random(CHECKPOINTS[published], folder)
        return str(folder)
    if settings.peer != "transformers" or config.layout == "transformers":
        return name
    say("writing the weights in the layout of transformers")
    source = load_checkpoint(name, device="cpu", dtype=settings.dtype)
    target = scratch / "transformers"
    tokenizer = source.folder / "tokenizer.json"
    try:
        save_checkpoint(
            source.model, target, config=source.config, tokenizer=tokenizer, layout="transformers"
        )
    except SeekVLError as error:
        raise SeekVLError(
            f"transformers cannot load {name} ({error}); measure it without a peer, or "
            "deepseek-vl-1.3b-chat with one"
        ) from error
    return str(target)


def _gguf(plain: str, kind: Kind | None, *, settings: Settings, scratch: Path, say: Say) -> Path:
    """Write the language model of plain weights for llama.cpp; return the file, alone in a folder."""
    say(f"writing the language model for llama.cpp, as {FORMATS[kind or DTYPES[settings.dtype]]}")
    language = load_checkpoint(plain, device="cpu", dtype=settings.dtype).model.language
    assert isinstance(language, Llama)
    target = scratch / "llama.cpp" / "model.gguf"
    target.parent.mkdir(exist_ok=True)
    write_gguf(language, target, kind=kind)
    return target


def _require_peer(peer: Peer, name: str, config: CheckpointConfig) -> None:
    """Refuse a peer that is not installed or lacks the model."""
    if isinstance(config.model, VL2Config):
        raise SeekVLError(
            f"{peer} is measured with DeepSeek-VL only; measure it without a peer, or a DeepSeek-VL with it"
        )
    if config.quantization is not None:
        raise SeekVLError(
            f"{name} is quantised, and what {peer} loads is made from plain weights; name the checkpoint "
            "that it was made from"
        )
    for package in PACKAGES[peer]:
        require(package, extra=EXTRAS[peer])


def _versions(peer: Peer | None) -> dict[str, str]:
    """Return the versions of what is measured."""
    found = {"seekvl": __version__, "torch": torch.__version__}
    if peer is None:
        return found
    package = require(PACKAGES[peer][0], extra=EXTRAS[peer])
    return found | {package.__name__: package.__version__}


def _compare(model: str, settings: Settings, *, file: Path | None, scratch: Path, say: Say) -> None:
    """Stop where the peer does not compute what seekvl does."""
    assert settings.peer is not None
    say(f"comparing answers with those of {settings.peer}")
    check = str(scratch / "logits.safetensors")
    ours = _run(replace(_job("seekvl", model, settings), check=check))
    theirs = _run(
        replace(_job(settings.peer, model, settings, file=file), check=check, expected=tuple(ours["tokens"]))
    )
    if theirs["disagreement"] is not None:
        raise SeekVLError(
            f"seekvl and {settings.peer} do not compute the same, so they are not timed: "
            f"{theirs['disagreement']}"
        )


def _alternate(
    model: str, settings: Settings, *, file: Path | None, say: Say
) -> tuple[dict[str, list[Measured]], list[Ceilings]]:
    """Measure the programs in turn; who goes first changes every round. The machine's ceilings are measured
    before each process and after the last.
    """
    sides: list[Side] = ["seekvl"] if settings.peer is None else ["seekvl", settings.peer]
    runs: dict[str, list[Measured]] = {side: [] for side in sides}
    ceilings = list[Ceilings]()

    def measure() -> None:
        """Measure memory and products."""
        if not wait_until_quiet(seconds=settings.quiet):
            say("  the machine is not idle; ratios may hold, absolute figures do not")
        say("measuring memory and products")
        ceilings.append(
            measure_ceilings(threads=settings.threads, dtype=settings.dtype, device=settings.device)
        )

    for number in range(settings.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            fill_page_cache(file.parent if side == "llama.cpp" and file is not None else find_folder(model))
            measure()
            say(f"round {number + 1} of {settings.rounds}: {side}")
            runs[side].append(Measured(**_run(_job(side, model, settings, file=file))))
    measure()
    return runs, ceilings


def _job(side: Side, model: str, settings: Settings, *, file: Path | None = None) -> Job:
    """Return what a process shall do; file: what llama.cpp loads."""
    return Job(
        side=side,
        model=model,
        dtype=settings.dtype,
        threads=settings.threads,
        batches=settings.batches,
        device=settings.device,
        tokens=settings.tokens,
        shown=settings.peer != "llama.cpp",
        file=None if file is None else str(file),
        preprocessing="transformers" if settings.peer == "transformers" else "seekvl",
    )


def _run(job: Job) -> dict[str, Any]:
    """Do a job in a fresh process, which downloads nothing; return what it says."""
    command = [sys.executable, "-m", "seekvl.evals.speed_process", json.dumps(asdict(job))]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | quiet)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        hint = (
            ": the system ended it, most likely for want of memory" if done.returncode == -9 else f": {last}"
        )
        raise SeekVLError(f"the process of {job.side} failed with exit code {done.returncode}{hint}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in said:
        raise SeekVLError(f"{job.side}: {said['error']}")
    return said


def _figures(
    report: Report,
    ours: Sequence[Measured],
    peer: Sequence[Measured] | None,
    *,
    config: CheckpointConfig,
    batches: Sequence[int],
) -> tuple[Figure, ...]:
    """Return the medians with their shares of the ceilings."""
    (shown,) = plan_pictures(config, (PICTURE,))
    work = works(
        config.model,
        prompt=report.prompt_tokens,
        views=shown.views,
        tokens=report.tokens,
        batches=batches,
        itemsize=DTYPES[report.dtype].itemsize,
        kind=report.quantize,
    )
    figures = []
    for name, (unit, rows, value) in _values(batches, shown=report.image_tokens > 0).items():
        mine = statistics.median(map(value, ours))
        theirs = None if peer is None else statistics.median(map(value, peer))
        figure = Figure(name=name, unit=unit, ours=mine, peer=theirs)
        if name in work:
            found, seconds = work[name], rows / mine if unit == "tok/s" else mine
            floor, bound = report.ceilings.seconds(
                read_bytes=found.read_bytes,
                operations=found.operations,
                whole_operations=found.whole_operations,
                dtype=report.dtype,
            )
            figure = replace(figure, work=found, seconds=seconds, share=floor / seconds, bound=bound)
        figures.append(figure)
    return tuple(figures)


def _values(
    batches: Sequence[int], *, shown: bool
) -> dict[str, tuple[str, int, Callable[[Measured], float]]]:
    """Return each figure's unit, its answers at once, and where a process has it; "vision" where a picture
    was shown.
    """
    values: dict[str, tuple[str, int, Callable[[Measured], float]]] = {
        "load": ("s", 1, lambda measured: measured.load),
        "first token": ("s", 1, lambda measured: measured.first_token),
        "vision": ("s", 1, lambda measured: measured.vision or 0.0),
        "prefill": ("s", 1, lambda measured: measured.prefill),
    }
    if not shown:
        del values["vision"]
    for rows in batches:
        values[decode(rows)] = ("tok/s", rows, lambda measured, key=str(rows): measured.decode[key])  # type: ignore[misc]  # a default binds the row
    for rows in batches:
        values[memory(rows)] = ("GiB", rows, lambda measured, key=str(rows): measured.memory[key])  # type: ignore[misc]  # a default binds the row
    return values
