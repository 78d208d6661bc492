"""seekvl-nano: a DeepSeek-VL-7B in miniature, trained from nothing on drawn pictures.

Every part of the 7B is there (SAM and SigLIP towers, hybrid adaptor, LLaMA), 1,700 times smaller. What the 7B
inherits, nano learns first: its towers by labelling their own grid, its language model from short dialogues.
Then come the three stages of 2403.05525, sec. 3.2.

    encoders    both towers                      label what lies under each cell
    language    language model                   text only
    stage 1     adaptor                          name what lies under each cell, in the language model's words
    stage 2     adaptor, language model          text and pictures, the share of text falling
    stage 3     SigLIP, adaptor, language model  several questions a picture
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from seekvl.corpus import nano as corpus
from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.hybrid import Hybrid, HybridConfig
from seekvl.models.llama import LlamaConfig
from seekvl.models.sam import SamConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VL, VLConfig
from seekvl.processing.encode import ModelInput, Processor
from seekvl.processing.pad_image import PadImageConfig
from seekvl.processing.template import Template
from seekvl.processing.tokenizer import Tokenizer
from seekvl.recipes.nano_encoders import Labeller, cell_batches, cell_loss
from seekvl.recipes.nano_naming import naming
from seekvl.recipes.nano_words import VOCABULARY, train_tokenizer
from seekvl.runtime import SeekVLError, log, seed_for, torch_generator
from seekvl.train.loop import Hook, Run, one_kind, train
from seekvl.train.objective import next_token_loss
from seekvl.train.schedule import LanguageShare, Schedule
from seekvl.train.stage import Group, Stage
from seekvl.train.step import B, M, Objective
from seekvl.train.streams import Streams
from seekvl.weights.config import CheckpointConfig
from seekvl.weights.save import save_checkpoint

HALF = (0.5, 0.5, 0.5)
LENGTHS = (64, 128, 192, 256, 320, 384, 448, 512)
"""Row lengths of batches: each new one costs a kernel set-up."""

MODEL = VLConfig(
    vision=HybridConfig(
        high=SamConfig(
            image_size=256,
            width=128,
            layers=4,
            heads=4,
            mlp_width=512,
            window=8,
            global_layers=(1, 3),
            neck_channels=64,
            downsample_channels=(96, 128),
            resize_side=40,
            pixel_mean=HALF,
            pixel_std=HALF,
        ),
        low=SiglipConfig(
            image_size=160,
            patch_size=16,
            width=128,
            layers=4,
            heads=4,
            mlp_width=512,
            pixel_mean=HALF,
            pixel_std=HALF,
        ),
    ),
    adaptor=AdaptorConfig(kind="low_high_hybrid_split_mlp_gelu", input_width=128, width=192),
    language=LlamaConfig(
        vocab_size=VOCABULARY, width=192, layers=4, heads=6, kv_heads=6, mlp_width=512, max_positions=2048
    ),
)
"""4 million parameters; 100 visual tokens a picture."""

IMAGE_CONFIG = PadImageConfig(
    image_size=256, patch_slots_side=10, mean=HALF, std=HALF, background=(127, 127, 127), low_size=160
)
RESIDUAL = ("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
"""Ends of the names of weights that write to a residual stream."""
TEMPLATE = Template(system="")
"""The template of the published models without its system prompt, which would be half of nano's tokens."""


def processor(tokenizer: Tokenizer) -> Processor:
    """Return the processor of nano."""
    return Processor(tokenizer, IMAGE_CONFIG, TEMPLATE, max_tokens=MODEL.language.max_positions)


def initialise(model: nn.Module, *, seed: int) -> None:
    """Fill a fresh network with random numbers: weights by their fan-in, those that write to a residual
    stream less.

    Biases are zero and positions of patches start as waves; norms, relative positions and SAM's alpha stay as
    made.
    """
    generator = torch_generator(seed, "initialise")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("pos_embed"):
            parameter.data.copy_(
                waves(parameter[0].numel() // parameter.shape[-1], parameter.shape[-1]).view_as(parameter)
            )
        elif parameter.dim() >= 2 and "rel_pos" not in name:
            std = parameter[0].numel() ** -0.5
            if name.endswith(RESIDUAL):
                std *= 0.35  # about 1 / sqrt(2 x 4 layers)
            nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)


def waves(cells: int, width: int) -> Tensor:
    """Return sines and cosines of row and column, f32[cells, width], for a square of row-major cells.

    A small tower that starts with them need not first find out where its patches are.
    """
    side = math.isqrt(cells)
    place = torch.arange(side).float()
    speed = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    angles = [axis.flatten()[:, None] * speed for axis in (rows, columns)]
    return 0.5 * torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


PLACES = (2.0, 1.0, 0.2, 0.2)
"""Weight of a token inside a box, by how many digits stand right before it: hundreds, tens, units, end.

What may stand at one place must weigh the same. By the digits that follow, the comma after a short number
would weigh ten times the third digit of a long one, and every number would end after two.
"""


def weigh_answers(inputs: ModelInput, *, tokenizer: Tokenizer) -> ModelInput:
    """Weigh tokens so that a long answer counts more than a short one, but not as many times more as it has
    tokens, and the last digits of a box hardly at all.

    By tokens, the digits of boxes would be most of what there is to learn, and "red" next to nothing; by
    answers, a digit would count a tenth of "red", and boxes come last or never.

        answer     red <eos>     <ref> red circle </ref> <det> [[ 1  2  0   , ...
        weights    .7   .7       .2    .2  .2     .2     .4    .4 .4 .2 .04 .04
    """
    assert inputs.loss_weights is not None
    counted = inputs.loss_weights > 0
    begins = counted & ~torch.cat((torch.zeros(1, dtype=torch.bool), counted[:-1]))
    answer = begins.cumsum(0) * counted  # t: number of the answer, 0 outside
    lengths = answer.bincount()[answer].float()
    return replace(inputs, loss_weights=counted * lengths**-0.5 * _places(inputs.input_ids, tokenizer))


def _places(ids: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Return f32[t], the weight of each token by its place in a number of a box; 1 outside of boxes."""
    opened, closed = (ids.eq(tokenizer.encode(mark)[0]) for mark in ("<|det|>", "<|/det|>"))
    inside = opened.cumsum(0) > closed.cumsum(0)
    digit = torch.isin(ids, torch.tensor([tokenizer.encode(str(digit))[0] for digit in range(10)])) & inside
    before = torch.zeros_like(ids)  # t: digits right before, at most 3
    run = torch.ones_like(digit)
    for back in range(1, len(PLACES)):
        run = run & torch.cat((torch.zeros(back, dtype=torch.bool), digit))[: len(digit)]
        before += run
    return torch.where(inside, torch.tensor(PLACES)[before], 1.0)


@dataclass(frozen=True, slots=True)
class TextSource:
    """Short dialogues without pictures."""

    processor: Processor
    seed: int

    def __call__(self, index: int) -> ModelInput:
        """Return sample `index`, encoded for training."""
        conversation = corpus.text_sample(self.seed, index).conversation
        return weigh_answers(
            self.processor.encode(conversation, train=True), tokenizer=self.processor.tokenizer
        )


@dataclass(frozen=True, slots=True)
class PictureSource:
    """Pictures with questions and answers; one in six is for counting, which mixed questions leave to small
    numbers.
    """

    processor: Processor
    seed: int
    questions: int
    """Most questions a picture."""

    def __call__(self, index: int) -> ModelInput:
        """Return sample `index`, encoded for training."""
        kind = "count" if index % 6 == 5 else None
        sample = corpus.sample(self.seed, index, kind=kind, questions=self.questions)
        return weigh_answers(
            self.processor.encode(sample.conversation, train=True), tokenizer=self.processor.tokenizer
        )


ADAPTOR = r"adaptor[.].*|vision[.]high[.](downsamples|neck|neck_hd)[.].*|vision[.]high[.]hd_alpha"
"""What the paper calls the adaptor: projections, and the convolutions that bring SAM's map to the common
grid.
"""
TRUNK = r"vision[.]high[.](patch_embed[.].*|pos_embed|blocks[.].*)"
LOW = r"vision[.]low[.].*"
MATRIX = r"[.]blocks[.].*[.](qkv|proj|fc1|fc2)[.]weight"
"""Matrices between the layers of a tower."""
TOWERS = (
    Group(pattern=rf"vision[.](high|low){MATRIX}", rule="muon", lr=3.0),
    Group(pattern=rf"vision[.](?!(high|low){MATRIX}).*"),
)
LANGUAGE = (
    Group(pattern=r"language[.]layers[.].*_proj[.]weight", rule="muon", lr=2.0),
    Group(pattern=r"language[.](?!layers[.].*_proj[.]).*"),
)


def encoders() -> Stage:
    """Warm-up of the towers; the last group is the linear layers thrown away afterwards."""
    return Stage(
        name="encoders",
        steps=4200,
        batch_size=16,
        lr=1e-3,
        schedule=Schedule(shape="cosine", warmup=100, floor=0.02),
        groups=(*TOWERS, Group(pattern=r"read_(high|low)[.].*")),
    )


def language() -> Stage:
    """Warm-up of the language model on text."""
    return Stage(
        name="language",
        steps=400,
        batch_size=32,
        lr=2e-3,
        schedule=Schedule(shape="cosine", warmup=100, floor=0.1),
        groups=(
            Group(pattern=r"vision[.].*", frozen=True),
            Group(pattern=r"adaptor[.].*", frozen=True),
            Group(pattern=r"language[.].*"),
        ),
    )


def stage1() -> Stage:
    """Adaptor warm-up: everything else frozen (2403.05525, sec. 3.2.1); its objective is `nano_naming`."""
    return Stage(
        name="stage1",
        steps=200,
        batch_size=32,
        lr=2e-3,
        schedule=Schedule(shape="cosine", warmup=20, floor=0.1),
        groups=(
            Group(pattern=r"adaptor[.].*"),
            Group(pattern=r"vision[.].*", frozen=True),
            Group(pattern=r"language[.].*", frozen=True),
        ),
    )


def stage2() -> Stage:
    """Joint pretraining: adaptor and language model (2403.05525, sec. 3.2.2).

    The share of text steps falls to 0.1, not to the paper's 0.7: that share protects what two trillion tokens
    taught the 7B, and nano's text is a few dialogue forms that it knows after its warm-up.
    """
    return Stage(
        name="stage2",
        steps=2600,
        batch_size=16,
        lr=1e-3,
        schedule=Schedule(shape="cosine", warmup=100, floor=0.3),
        groups=(
            Group(pattern=ADAPTOR),
            Group(pattern=TRUNK, frozen=True),
            Group(pattern=LOW, frozen=True),
            *LANGUAGE,
        ),
        language=LanguageShare(target=0.1, start=0.5, warmup=300),
    )


def stage3() -> Stage:
    """Supervised fine-tuning: SAM stays frozen, the rest learns (2403.05525, sec. 3.2.3)."""
    return Stage(
        name="stage3",
        steps=1300,
        batch_size=16,
        lr=4e-4,
        schedule=Schedule(shape="cosine", warmup=20),
        groups=(
            Group(pattern=ADAPTOR),
            Group(pattern=TRUNK, frozen=True),
            Group(pattern=rf"vision[.]low{MATRIX}", rule="muon", lr=2.0),
            Group(pattern=rf"vision[.]low(?!{MATRIX}).*"),
            *LANGUAGE,
        ),
        language=LanguageShare(target=0.05),
    )


CHECKPOINT = CheckpointConfig(
    model=MODEL, image=IMAGE_CONFIG, template=TEMPLATE, max_tokens=MODEL.language.max_positions
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """What belongs to one start of the recipe: where it runs and how long it takes."""

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


def build(
    folder: Path,
    *,
    seed: int = 0,
    device: torch.device,
    workers: int = 1,
    threads: int | None = None,
    scale: float = 1.0,
    resume: bool = True,
    hooks: Sequence[Hook] = (),
) -> Path:
    """Train nano from nothing and return the folder of the finished checkpoint, in the official layout.

    Every stage saves as it goes; a second call with the same folder goes on where the first one stopped.
    Raises SeekVLError for a scale that is not above 0 and for a folder that holds something else.
    """
    if not scale > 0:
        raise SeekVLError(f"scale {scale} must be above 0")
    start = Build(
        folder=folder, device=device, seed=seed, workers=workers, threads=threads, scale=scale, resume=resume
    )
    folder.mkdir(parents=True, exist_ok=True)
    words = folder / "tokenizer.json"
    if not words.exists():
        log.info("learning the tokenizer")
        train_tokenizer(words, template=TEMPLATE, seed=seed)
    prepare = processor(Tokenizer.from_file(words))
    model = VL(MODEL)
    initialise(model, seed=seed)
    _warm_up_towers(start, model, hooks=hooks)
    _run_stage(start, model, prepare, stage=start.stage(language()), questions=0, hooks=hooks)
    _warm_up_adaptor(start, model, prepare, hooks=hooks)
    for stage in (stage2(), stage3()):
        _run_stage(start, model, prepare, stage=start.stage(stage), questions=8, hooks=hooks)
    target = folder / "seekvl-nano"
    save_checkpoint(model, target, config=CHECKPOINT, tokenizer=words, dtype=torch.float16, overwrite=True)
    return target


def _warm_up_towers(start: Build, model: VL, *, hooks: Sequence[Hook]) -> None:
    assert isinstance(model.vision, Hybrid)
    stage = start.stage(encoders())
    cells = cell_batches(IMAGE_CONFIG, batch_size=stage.batch_size, seed=start.seed)
    _train(start, Labeller(model.vision), stage=stage, batch=cells, objective=cell_loss, hooks=hooks)


def _warm_up_adaptor(start: Build, model: VL, prepare: Processor, *, hooks: Sequence[Hook]) -> None:
    stage = start.stage(stage1())
    cells = cell_batches(IMAGE_CONFIG, batch_size=stage.batch_size, seed=seed_for(start.seed, stage.name))
    _train(start, model, stage=stage, batch=cells, objective=naming(prepare.tokenizer), hooks=hooks)


def _run_stage(
    start: Build, model: VL, prepare: Processor, *, stage: Stage, questions: int, hooks: Sequence[Hook]
) -> None:
    """Train one stage; `questions` is the most a picture is asked, 0 for a stage of text alone."""
    text = TextSource(prepare, start.seed) if questions == 0 or stage.language else None
    streams = Streams(
        batch_size=stage.batch_size,
        lengths=LENGTHS,
        pad_id=prepare.tokenizer.pad_id,
        language=text,
        multimodal=PictureSource(prepare, seed_for(start.seed, stage.name), questions) if questions else None,
        share=stage.language,
    )
    _train(
        start, model, stage=stage, batch=streams, objective=next_token_loss, hooks=hooks, kind=streams.kind
    )


def _train(
    start: Build,
    model: M,
    *,
    stage: Stage,
    batch: Callable[[int], B],
    objective: Objective[M, B],
    hooks: Sequence[Hook],
    kind: Callable[[int], str] = one_kind,
) -> None:
    """Train one stage in a folder of its own."""
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
    train(run, resume=start.resume, hooks=hooks)
