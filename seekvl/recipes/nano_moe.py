"""seekvl-nano-moe: a DeepSeek-VL2 in miniature, trained on the drawn pictures of seekvl-nano.

Every part of the base model is there (tiles, SigLIP, the adaptor that makes one feature of 2 x 2, latent
attention, experts behind a router without loss), 4,500 times smaller. Its tower is seekvl-nano's, as the
published tower is SigLIP's; it first learns to see tiles, and the language model learns from short dialogues.
Then come the three stages of 2412.10302, sec. 3.

    encoders    tower             label what lies under each cell of each tile
    language    language model    text only
    stage 1     tower, adaptor    name what lies under each feature, in the language model's words
    stage 2     everything        text and pictures, the share of text falling
    stage 3     everything        several questions a picture
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from seekvl.corpus import nano as corpus
from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.hybrid import Hybrid
from seekvl.models.mla import MlaConfig
from seekvl.models.moe import MoeConfig
from seekvl.models.siglip import Siglip, SiglipConfig
from seekvl.models.vl2 import VL2, VL2Config
from seekvl.processing.encode import Processor
from seekvl.processing.template import DEEPSEEK_VL2
from seekvl.processing.tile_image import GRIDS_9, TileImageConfig
from seekvl.processing.tokenizer import BOS, EOS, VL2_ADDED, Tokenizer
from seekvl.recipes.nano import MATRIX, QUESTIONS
from seekvl.recipes.nano_build import Build, learn_to_answer, learn_words, warm_up_adaptor, warm_up_towers
from seekvl.recipes.nano_encoders import DrawScene
from seekvl.recipes.nano_initialise import initialise
from seekvl.recipes.nano_sources import Draw, PictureSource, TextSource
from seekvl.recipes.nano_views import Tiles
from seekvl.recipes.nano_words import VOCABULARY
from seekvl.runtime import SeekVLError, seed_for
from seekvl.train.schedule import LanguageShare, Schedule
from seekvl.train.stage import Group, Stage
from seekvl.weights.config import VL2_TOKENS, CheckpointConfig
from seekvl.weights.load import NANO, NANO_MOE, load_checkpoint, open_tokenizer
from seekvl.weights.save import save_checkpoint

LENGTHS = (64, 128, 192, 256, 288, 320, 352, 384, 416, 448, 480, 512, 576, 640, 768, 1024)
"""Row lengths of batches: each new one costs a kernel set-up. The last bounds the memory of a step."""
MOST_TILES = 6

MODEL = VL2Config(
    vision=SiglipConfig(
        image_size=160, patch_size=16, width=128, layers=4, heads=4, mlp_width=512, gelu="tanh"
    ),
    adaptor=AdaptorConfig(kind="downsample_mlp_gelu", input_width=128, width=192, downsample=2),
    language=DeepseekV2Config(
        vocab_size=VOCABULARY,
        width=192,
        layers=4,
        heads=6,
        kv_heads=6,
        mlp_width=512,
        max_positions=2048,
        mla=MlaConfig(kv_rank=64, nope_width=32, rope_width=16, value_width=32),
        moe=MoeConfig(
            experts=16,
            active=4,
            shared=1,
            width=128,
            scoring="sigmoid",
            choice="noaux_tc",
            normalise=True,
            scale=2.0,  # as in base: four experts of weight 1/2 together vary as much as one
            aux_alpha=0.0001,  # of base, 2412.10302, hyper-parameter table
        ),
        dense_first=1,
    ),
)
"""6 million parameters, of which a token meets 3.4; 61 visual tokens a single tile, up to 211 a picture."""

IMAGE_CONFIG = TileImageConfig(
    image_size=160,
    grids=tuple((columns, rows) for columns, rows in GRIDS_9 if columns * rows <= MOST_TILES),
    patch_size=16,
    downsample=2,
)
SPECIALS = (BOS, EOS, *VL2_ADDED)
"""Special tokens of its vocabulary, all that the template and the marks of boxes need."""
CHECKPOINT = CheckpointConfig(
    model=MODEL,
    image=IMAGE_CONFIG,
    template=DEEPSEEK_VL2,
    specials=replace(VL2_TOKENS, added=VL2_ADDED),
    max_tokens=MODEL.language.max_positions,
)

MIXTURE = corpus.Mixture(shapes=45, sign=25, chart=10, strip=20)
"""Nano's pictures, and long and tall ones with small print."""
DRAW: Draw = partial(corpus.sample, mixture=MIXTURE)
"""What draws the pictures with questions."""
DRAW_SCENE: DrawScene = partial(corpus.scene, mixture=MIXTURE)
"""What draws the pictures whose cells are labelled and named."""


def open_words(path: Path) -> Tokenizer:
    """Open the `tokenizer.json` of a build."""
    return open_tokenizer(path, CHECKPOINT)


def processor(tokenizer: Tokenizer) -> Processor:
    """Return the processor of nano-moe."""
    return Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK_VL2, max_tokens=MODEL.language.max_positions)


ADAPTOR = Group(pattern=r"adaptor[.].*|image_newline|view_separator")
ROUTER_BIAS = Group(pattern=r"language[.]layers[.].*[.]gate[.]bias", frozen=True)
"""No gradient moves it; `Stage.bias_gamma` does."""
LANGUAGE = (
    Group(pattern=r"language[.]layers[.].*(_proj[.]weight|[.]experts[.].*)", rule="muon", lr=2.0),
    Group(pattern=r"language[.](?!layers[.].*(_proj|[.]gate[.]bias)).*"),
    ROUTER_BIAS,
)


def tower(*, lr: float) -> tuple[Group, ...]:
    """Return the lines of the tower; `lr` is what its learning rate is multiplied by."""
    return (
        Group(pattern=rf"vision{MATRIX}", rule="muon", lr=2.0 * lr),
        Group(pattern=rf"vision(?!{MATRIX}).*", lr=lr),
    )


TOWER = tower(lr=0.1)
"""In the paper's stages: a tenth of the learning rate (2412.10302, hyper-parameter table)."""


def encoders() -> Stage:
    """Warm-up of the tower on tiles, new to it; the last group is the linear layer thrown away afterwards."""
    return Stage(
        name="encoders",
        steps=4800,
        batch_size=16,
        lr=1e-3,
        schedule=Schedule(shape="cosine", warmup=100, floor=0.02),
        groups=(*tower(lr=1.0), Group(pattern=r"read[.].*")),
    )


def language() -> Stage:
    """Warm-up of the language model on text; its routers are balanced from the start."""
    return Stage(
        name="language",
        steps=300,
        batch_size=32,
        lr=2e-3,
        schedule=Schedule(shape="cosine", warmup=100, floor=0.1),
        groups=(
            Group(pattern=r"vision[.].*", frozen=True),
            replace(ADAPTOR, frozen=True),
            Group(pattern=r"language[.](?!layers[.].*[.]gate[.]bias).*"),
            ROUTER_BIAS,
        ),
        bias_gamma=0.001,
    )


def stage1() -> Stage:
    """Alignment: tower and adaptor learn (2412.10302, sec. 3); its objective is `nano_naming`."""
    return Stage(
        name="stage1",
        steps=2400,
        batch_size=16,
        lr=2e-3,
        schedule=Schedule(shape="cosine", warmup=50, floor=0.05),
        groups=(*TOWER, ADAPTOR, Group(pattern=r"language[.].*", frozen=True)),
    )


def stage2() -> Stage:
    """Pretraining of everything (2412.10302, sec. 3), with the router bias moving.

    The share of text steps falls to 0.1, not to the paper's 0.3, for the reason that nano's does.
    """
    return Stage(
        name="stage2",
        steps=1000,
        batch_size=16,
        lr=1e-3,
        schedule=Schedule(shape="cosine", warmup=100, floor=0.3),
        groups=(*TOWER, ADAPTOR, *LANGUAGE),
        language=LanguageShare(target=0.1, start=0.5, warmup=300),
        bias_gamma=0.001,  # 2412.10302, hyper-parameter table: 0, 0.001 and 0 in the three stages
    )


def stage3() -> Stage:
    """Supervised fine-tuning of everything (2412.10302, sec. 3)."""
    return Stage(
        name="stage3",
        steps=6700,
        batch_size=16,
        lr=1e-3,
        schedule=Schedule(shape="cosine", warmup=100),
        groups=(*TOWER, ADAPTOR, *LANGUAGE),
        language=LanguageShare(target=0.05),
    )


def inherited_tower() -> Siglip:
    """Return the SigLIP tower of the bundled seekvl-nano.

    Raises SeekVLError where it is of other dimensions than nano-moe's.
    """
    nano = load_checkpoint(NANO, device="cpu", dtype="float32").model
    assert isinstance(nano.vision, Hybrid)
    found = replace(nano.vision.low.config, gelu="tanh", pixel_mean=None, pixel_std=None)
    if found != MODEL.vision:
        raise SeekVLError(f"the SigLIP tower of {NANO} is {found}; nano-moe needs {MODEL.vision}")
    return nano.vision.low


def build(start: Build) -> Path:
    """Train nano-moe and return the folder of the finished checkpoint, in the official layout.

    Every stage saves as it goes; a second call with the same folder goes on where the first one stopped.
    Raises SeekVLError for a folder that holds something else.
    """
    words = learn_words(start, template=DEEPSEEK_VL2, specials=SPECIALS, draw=DRAW)
    prepare = processor(open_words(words))
    model = VL2(MODEL)
    initialise(model, seed=start.seed)
    model.vision.load_state_dict(inherited_tower().state_dict())
    patches = Tiles(IMAGE_CONFIG, MODEL.vision.grid)
    warm_up_towers(start, model.vision, stage=encoders(), look=patches, draw=DRAW_SCENE)
    text = TextSource(prepare, start.seed, NANO_MOE)
    learn_to_answer(start, model, stage=language(), lengths=LENGTHS, text=text)
    features = Tiles(IMAGE_CONFIG, MODEL.view_side)
    warm_up_adaptor(start, model, stage=stage1(), look=features, draw=DRAW_SCENE, tokenizer=prepare.tokenizer)
    for stage in (stage2(), stage3()):
        pictures = PictureSource(prepare, seed_for(start.seed, stage.name), QUESTIONS, DRAW)
        learn_to_answer(start, model, stage=stage, lengths=LENGTHS, text=text, pictures=pictures)
    target = start.folder / NANO_MOE
    save_checkpoint(model, target, config=CHECKPOINT, tokenizer=words, dtype=torch.float16, overwrite=True)
    return target
