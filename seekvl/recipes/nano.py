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

from functools import partial
from pathlib import Path

import torch

from seekvl.corpus import nano as corpus
from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.hybrid import Hybrid, HybridConfig
from seekvl.models.llama import LlamaConfig
from seekvl.models.sam import SamConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VL, VLConfig
from seekvl.processing.encode import Processor
from seekvl.processing.pad_image import PadImageConfig
from seekvl.processing.template import Template
from seekvl.processing.tokenizer import BOS, EOS, GROUNDING_MARKS, IMAGE, Tokenizer
from seekvl.recipes.nano_build import Build, learn_to_answer, learn_words, warm_up_adaptor, warm_up_towers
from seekvl.recipes.nano_initialise import initialise
from seekvl.recipes.nano_sources import Draw, PictureSource, TextSource
from seekvl.recipes.nano_views import Squares
from seekvl.recipes.nano_words import VOCABULARY
from seekvl.runtime import seed_for
from seekvl.train.schedule import LanguageShare, Schedule
from seekvl.train.stage import Group, Stage
from seekvl.weights.config import CheckpointConfig
from seekvl.weights.load import NANO
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
TEMPLATE = Template(system="")
"""The template of the published models without its system prompt, which would be half of nano's tokens."""
SPECIALS = (BOS, EOS, IMAGE, *GROUNDING_MARKS)
"""Special tokens of its vocabulary: those of DeepSeek-VL, and the marks of boxes of DeepSeek-VL2."""
QUESTIONS = 8
"""Most questions a picture."""
DRAW: Draw = partial(corpus.sample, mixture=corpus.Mixture(shapes=74, sign=16, chart=10, strip=0))
"""What draws the pictures with questions: more shapes than are measured, for they are what takes longest."""


def processor(tokenizer: Tokenizer) -> Processor:
    """Return the processor of nano."""
    return Processor(tokenizer, IMAGE_CONFIG, TEMPLATE, max_tokens=MODEL.language.max_positions)


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
        steps=13000,
        batch_size=16,
        lr=1e-3,
        schedule=Schedule(shape="cosine", warmup=100),
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


def build(start: Build) -> Path:
    """Train nano from nothing and return the folder of the finished checkpoint, in the official layout.

    Every stage saves as it goes; a second call with the same folder goes on where the first one stopped.
    Raises SeekVLError for a folder that holds something else.
    """
    words = learn_words(start, template=TEMPLATE, specials=SPECIALS)
    prepare = processor(Tokenizer.from_file(words))
    model, look = VL(MODEL), Squares(IMAGE_CONFIG)
    initialise(model, seed=start.seed)
    assert isinstance(model.vision, Hybrid)
    warm_up_towers(start, model.vision, stage=encoders(), look=look, draw=corpus.scene)
    text = TextSource(prepare, start.seed, NANO)
    learn_to_answer(start, model, stage=language(), lengths=LENGTHS, text=text)
    warm_up_adaptor(start, model, stage=stage1(), look=look, draw=corpus.scene, tokenizer=prepare.tokenizer)
    for stage in (stage2(), stage3()):
        pictures = PictureSource(prepare, seed_for(start.seed, stage.name), QUESTIONS, DRAW)
        learn_to_answer(start, model, stage=stage, lengths=LENGTHS, text=text, pictures=pictures)
    target = start.folder / NANO
    save_checkpoint(model, target, config=CHECKPOINT, tokenizer=words, dtype=torch.float16, overwrite=True)
    return target
