"""A toy that learns in seconds: a tiny language model that must answer with the first token of its row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from seekvl.data.collate import Batch, Part
from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.llama import LlamaConfig
from seekvl.models.mla import MlaConfig
from seekvl.models.moe import Choice, MoeConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VL, VLConfig
from seekvl.models.vl2 import VL2, VL2Config
from seekvl.runtime import torch_generator
from seekvl.train.loop import Run
from seekvl.train.objective import next_token_loss
from seekvl.train.schedule import Schedule
from seekvl.train.stage import Group, Stage

VOCAB, LENGTH, ROWS, SIDE = 32, 10, 16, 8
SLOTS = 4


def tiny_vl(seed: int = 0) -> VL:
    """Build a network of a few thousand parameters."""
    torch.manual_seed(seed)
    model = VL(
        VLConfig(
            vision=SiglipConfig(
                image_size=SIDE,
                patch_size=4,
                width=16,
                layers=1,
                heads=2,
                mlp_width=32,
                pixel_mean=(0.5, 0.5, 0.5),
                pixel_std=(0.5, 0.5, 0.5),
            ),
            adaptor=AdaptorConfig(kind="mlp_gelu", input_width=16, width=32),
            language=LlamaConfig(vocab_size=VOCAB, width=32, layers=1, heads=2, kv_heads=2, mlp_width=64),
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_vl2(seed: int = 0, *, choice: Choice = "noaux_tc", aux_alpha: float = 0.01) -> VL2:
    """Build a network with 4 experts in its second layer, of which a token meets one."""
    torch.manual_seed(seed)
    model = VL2(
        VL2Config(
            vision=SiglipConfig(image_size=SIDE, patch_size=4, width=16, layers=1, heads=2, mlp_width=32),
            adaptor=AdaptorConfig(kind="downsample_mlp_gelu", input_width=16, width=32, downsample=2),
            language=DeepseekV2Config(
                vocab_size=VOCAB,
                width=32,
                layers=2,
                heads=2,
                kv_heads=2,
                mlp_width=64,
                mla=MlaConfig(kv_rank=16, nope_width=8, rope_width=8, value_width=16),
                moe=MoeConfig(
                    experts=4,
                    active=1,
                    shared=1,
                    width=16,
                    scoring="sigmoid",
                    choice=choice,
                    aux_alpha=aux_alpha,
                ),
                dense_first=1,
            ),
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


EXPERTS = (
    Group(pattern="language[.].*[.]experts[.].*", rule="muon"),
    Group(pattern="language[.](?!.*([.]experts[.]|[.]gate[.]bias)).*"),
    Group(
        pattern="(vision|adaptor)[.].*|image_newline|view_separator|language[.].*[.]gate[.]bias", frozen=True
    ),
)
"""For `tiny_vl2`."""


@dataclass(frozen=True)
class Toy:
    """Batches by step: rows end in their first token, or in one that tells how bright their picture is."""

    seed: int = 0
    pictures: bool = False

    def __call__(self, step: int) -> Batch:
        generator = torch_generator(self.seed, "toy", step)
        ids = torch.randint(8, VOCAB, (ROWS, LENGTH), generator=generator)
        weights = torch.zeros(ROWS, LENGTH)
        weights[:, -1] = 1.0
        mask = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        pixels = None
        if self.pictures:
            levels = torch.randint(0, 4, (ROWS,), generator=generator)
            pixels = (levels.float() / 3).view(ROWS, 1, 1, 1).expand(ROWS, 3, SIDE, SIDE).contiguous()
            mask[:, 1 : 1 + SLOTS] = True
            ids[:, -1] = 8 + levels
        else:
            ids[:, 0] = torch.randint(8, 12, (ROWS,), generator=generator)
            ids[:, -1] = ids[:, 0]
        return Batch(
            input_ids=ids,
            loss_weights=weights,
            image_mask=mask,
            positions=torch.arange(LENGTH).repeat(ROWS, 1),
            present=torch.ones(ROWS, LENGTH, dtype=torch.bool),
            parts=(Part(rows=ROWS, tokens=LENGTH),),
            pixels=pixels,
            low_pixels=None,
            normalized=False,
        )


ALL = (Group(pattern=".*"),)
LANGUAGE = (Group(pattern="language[.].*"), Group(pattern="(vision|adaptor)[.].*", frozen=True))


def toy_stage(steps: int = 12, *, groups: tuple[Group, ...] = LANGUAGE, lr: float = 3e-3) -> Stage:
    """Return a short stage."""
    schedule = Schedule(shape="cosine", warmup=2)
    return Stage(name="toy", steps=steps, batch_size=ROWS, lr=lr, schedule=schedule, groups=groups)


ToyRun = Callable[..., "Run[VL, Batch]"]


@pytest.fixture
def toy_run(tmp_path: Path) -> ToyRun:
    """Return a maker of toy runs; `steps` and any field of Run can be set."""

    def make(*, steps: int = 12, folder: str = "run", **fields: object) -> "Run[VL, Batch]":
        run = Run(
            model=tiny_vl(),
            stage=toy_stage(steps),
            batch=Toy(),
            objective=next_token_loss,
            folder=tmp_path / folder,
            seed=0,
            threads=1,
        )
        return replace(run, **fields)

    return make
