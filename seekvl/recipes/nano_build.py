"""How the small models are built: one start of a recipe, and the kinds of stages it runs, each in a folder of
its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from seekvl.corpus import nano as corpus
from seekvl.engine.kernels.accelerate import LEARNERS, accelerate
from seekvl.models.hybrid import Hybrid
from seekvl.models.siglip import Siglip
from seekvl.models.vl2 import AnyVL
from seekvl.processing.template import Template
from seekvl.processing.tokenizer import Tokenizer
from seekvl.recipes.nano_encoders import DrawScene, Labeller, cell_batches, cell_loss
from seekvl.recipes.nano_naming import naming
from seekvl.recipes.nano_sources import Draw, PictureSource, TextSource
from seekvl.recipes.nano_views import Look
from seekvl.recipes.nano_words import train_tokenizer
from seekvl.runtime import SeekVLError, log, seed_for
from seekvl.train.loop import Hook, Run, one_kind, train
from seekvl.train.objective import next_token_loss
from seekvl.train.stage import Stage
from seekvl.train.step import B, M, Objective
from seekvl.train.streams import Streams

CPU_PARTS = 4
"""Parts of rows of alike length on a CPU. Of nano-moe's batches of 16 a third is padding, with four parts a
tenth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """What belongs to one start of a recipe: where it runs and how long it takes."""

    folder: Path
    """Where the stages keep their checkpoints and logs."""
    device: torch.device
    seed: int = 0
    workers: int = 1
    """Processes that draw pictures ahead."""
    threads: int | None = None
    """CPU threads of torch; None leaves them as they are."""
    scale: float = 1.0
    """Multiplier on the steps of every stage, for trying the recipe out."""
    resume: bool = True
    """Go on where an earlier start stopped; otherwise the folder must be empty."""
    hooks: tuple[Hook, ...] = ()
    """Called after every step of every stage."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise SeekVLError(f"scale {self.scale} must be above 0 and finite")

    def stage(self, stage: Stage) -> Stage:
        """Return the stage with its steps scaled, warm-ups included."""
        if self.scale == 1.0:
            return stage

        def scaled(steps: int) -> int:
            """Return the steps of this start, at least one."""
            return max(1, round(steps * self.scale))

        share = stage.language and replace(stage.language, warmup=round(stage.language.warmup * self.scale))
        schedule = replace(stage.schedule, warmup=min(scaled(stage.schedule.warmup), scaled(stage.steps)))
        return replace(stage, steps=scaled(stage.steps), schedule=schedule, language=share)


def learn_words(
    start: Build, *, template: Template, specials: tuple[str, ...], draw: Draw = corpus.sample
) -> Path:
    """Return the `tokenizer.json` of a build, learnt by its first start."""
    start.folder.mkdir(parents=True, exist_ok=True)
    words = start.folder / "tokenizer.json"
    if not words.exists():
        log.info("learning the tokenizer")
        train_tokenizer(words, template=template, specials=specials, draw=draw, seed=start.seed)
    return words


def warm_up_towers(
    start: Build, vision: Hybrid | Siglip, *, stage: Stage, look: Look, draw: DrawScene
) -> None:
    """Let the towers learn what lies under each of their cells."""
    stage = start.stage(stage)
    cells = cell_batches(look, batch_size=stage.batch_size, seed=start.seed, draw=draw)
    run_stage(start, Labeller(vision), stage=stage, batch=cells, objective=cell_loss)


def warm_up_adaptor(
    start: Build, model: AnyVL, *, stage: Stage, look: Look, draw: DrawScene, tokenizer: Tokenizer
) -> None:
    """Let what the stage leaves free learn to name what lies under each feature the adaptor makes."""
    stage = start.stage(stage)
    seed = seed_for(start.seed, stage.name)
    cells = cell_batches(look, batch_size=stage.batch_size, seed=seed, draw=draw)
    run_stage(start, model, stage=stage, batch=cells, objective=naming(tokenizer))


def learn_to_answer(
    start: Build,
    model: AnyVL,
    *,
    stage: Stage,
    lengths: tuple[int, ...],
    text: TextSource | None = None,
    pictures: PictureSource | None = None,
) -> None:
    """Train one stage on dialogues, on questions about pictures, or on both by the stage's language share."""
    stage = start.stage(stage)
    given = text or pictures
    assert given is not None
    streams = Streams(
        batch_size=stage.batch_size,
        lengths=lengths,
        pad_id=given.processor.tokenizer.pad_id,
        parts=min(CPU_PARTS, stage.batch_size) if start.device.type == "cpu" else 1,
        language=text,
        multimodal=pictures,
        share=stage.language,
    )
    run_stage(start, model, stage=stage, batch=streams, objective=next_token_loss, kind=streams.kind)


def run_stage(
    start: Build,
    model: M,
    *,
    stage: Stage,
    batch: Callable[[int], B],
    objective: Objective[M, B],
    kind: Callable[[int], str] = one_kind,
) -> None:
    """Train one stage, its steps already scaled, in a folder of its own; on a CPU experts learn through the
    kernels.
    """
    accelerate(model, kernels=LEARNERS)
    run = Run(
        model=model,
        stage=stage,
        batch=batch,
        objective=objective,
        folder=start.folder / stage.name,
        seed=start.seed,
        kind=kind,
        device=start.device,
        precision="bfloat16",
        workers=start.workers,
        threads=start.threads,
    )
    train(run, resume=start.resume, hooks=start.hooks)
