"""What is published, by name: vision towers, and checkpoints as configs of model, picture and prompt. Data
only.
"""

from dataclasses import dataclass

from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.hybrid import HybridConfig
from seekvl.models.llama import LlamaConfig
from seekvl.models.mla import MlaConfig
from seekvl.models.moe import MoeConfig
from seekvl.models.sam import SamConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl import VLConfig
from seekvl.models.vl2 import AnyConfig, VL2Config
from seekvl.processing.pad_image import PadImageConfig
from seekvl.processing.template import DEEPSEEK, DEEPSEEK_VL2, Template
from seekvl.processing.tile_image import GRIDS_9, TileImageConfig

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

TRAINED_TOKENS = 4096
"""Sequence length of the last training stage (2403.05525, Table 4; 2412.10302, hyper-parameter table): the
context the checkpoints are good for.
"""

SIGLIP_TOWERS = {
    "siglip_large_patch16_384": SiglipConfig(
        image_size=384, patch_size=16, width=1024, layers=24, heads=16, mlp_width=4096
    ),
    "siglip_so400m_patch14_384": SiglipConfig(
        image_size=384, patch_size=14, width=1152, layers=27, heads=16, mlp_width=4304
    ),
}
"""SigLIP towers by the `model_name` of published configs, without normalisation."""

SAM_TOWERS = {"sam_b_downsample": SamConfig()}
"""SAM towers by the `model_name` of published configs, without normalisation."""

SIGLIP_LARGE = SiglipConfig(
    image_size=384,
    patch_size=16,
    width=1024,
    layers=24,
    heads=16,
    mlp_width=4096,
    pixel_mean=HALF,
    pixel_std=HALF,
)
"""siglip_large_patch16_384 as DeepSeek-VL uses it."""

SAM_B = SamConfig(pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD)
"""sam_b_downsample as DeepSeek-VL-7B uses it."""

SIGLIP_SO400M = SiglipConfig(
    image_size=384, patch_size=14, width=1152, layers=27, heads=16, mlp_width=4304, gelu="tanh"
)
"""siglip_so400m_patch14_384 as DeepSeek-VL2 uses it: tanh GELU, pixels normalised by the processor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A published checkpoint without its weights."""

    model: AnyConfig
    image: PadImageConfig | TileImageConfig
    template: Template


VL_1B = Preset(
    model=VLConfig(
        vision=SIGLIP_LARGE,
        adaptor=AdaptorConfig(kind="mlp_gelu", input_width=1024, width=2048),
        language=LlamaConfig(vocab_size=102400, width=2048, layers=24, heads=16, kv_heads=16, mlp_width=5632),
    ),
    image=PadImageConfig(
        image_size=384, patch_slots_side=24, mean=HALF, std=HALF, background=(127, 127, 127)
    ),
    template=DEEPSEEK,
)
"""DeepSeek-VL 1.3B: SigLIP alone."""

VL_7B = Preset(
    model=VLConfig(
        vision=HybridConfig(high=SAM_B, low=SIGLIP_LARGE),
        adaptor=AdaptorConfig(kind="low_high_hybrid_split_mlp_gelu", input_width=1024, width=4096),
        language=LlamaConfig(
            vocab_size=102400, width=4096, layers=30, heads=32, kv_heads=32, mlp_width=11008
        ),
    ),
    image=PadImageConfig(
        image_size=1024,
        patch_slots_side=24,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        background=(122, 116, 104),
        low_size=384,
        low_mean=HALF,
        low_std=HALF,
    ),
    template=DEEPSEEK,
)
"""DeepSeek-VL 7B: SAM-B and SigLIP."""

LATENT_512 = MlaConfig(kv_rank=512, nope_width=128, rope_width=64, value_width=128)
"""The latent attention of DeepSeek-VL2 small and base (2412.10302, sec. 2)."""

TILES_384 = TileImageConfig(image_size=384, grids=GRIDS_9)
"""Tiles of 384 px, at most nine of them and the global view."""

VL2_TINY = Preset(
    model=VL2Config(
        vision=SIGLIP_SO400M,
        adaptor=AdaptorConfig(kind="downsample_mlp_gelu", input_width=1152, width=1280, downsample=2),
        language=DeepseekV2Config(
            vocab_size=129280,
            width=1280,
            layers=12,
            heads=10,
            kv_heads=10,
            mlp_width=6848,
            mla=None,
            moe=MoeConfig(experts=64, active=6, shared=2, width=896, scoring="softmax", choice="greedy"),
            dense_first=1,
        ),
    ),
    image=TILES_384,
    template=DEEPSEEK_VL2,
)
"""DeepSeek-VL2-tiny: DeepSeekMoE-3B with plain multi-head attention."""

VL2_SMALL = Preset(
    model=VL2Config(
        vision=SIGLIP_SO400M,
        adaptor=AdaptorConfig(kind="downsample_mlp_gelu", input_width=1152, width=2048, downsample=2),
        language=DeepseekV2Config(
            vocab_size=102400,
            width=2048,
            layers=27,
            heads=16,
            kv_heads=16,
            mlp_width=10944,
            mla=LATENT_512,
            moe=MoeConfig(experts=64, active=6, shared=2, width=1408, scoring="softmax", choice="greedy"),
            dense_first=1,
        ),
    ),
    image=TILES_384,
    template=DEEPSEEK_VL2,
)
"""DeepSeek-VL2-small: DeepSeekMoE-16B with latent attention."""

VL2_BASE = Preset(
    model=VL2Config(
        vision=SIGLIP_SO400M,
        adaptor=AdaptorConfig(kind="downsample_mlp_gelu", input_width=1152, width=2560, downsample=2),
        language=DeepseekV2Config(
            vocab_size=129280,
            width=2560,
            layers=30,
            heads=32,
            kv_heads=32,
            mlp_width=12288,
            mla=LATENT_512,
            moe=MoeConfig(
                experts=72,
                active=6,
                shared=2,
                width=1536,
                scoring="sigmoid",
                choice="noaux_tc",
                normalise=True,
                scale=2.0,
            ),
            dense_first=1,
        ),
    ),
    image=TILES_384,
    template=DEEPSEEK_VL2,
)
"""DeepSeek-VL2: DeepSeekMoE-27B, whose router scores with a sigmoid and a correction bias."""

CHECKPOINTS = {
    "deepseek-ai/deepseek-vl-1.3b-base": VL_1B,
    "deepseek-ai/deepseek-vl-1.3b-chat": VL_1B,
    "deepseek-ai/deepseek-vl-7b-base": VL_7B,
    "deepseek-ai/deepseek-vl-7b-chat": VL_7B,
    "deepseek-ai/deepseek-vl2-tiny": VL2_TINY,
    "deepseek-ai/deepseek-vl2-small": VL2_SMALL,
    "deepseek-ai/deepseek-vl2": VL2_BASE,
}
"""Published checkpoints by hub id; base and chat of DeepSeek-VL differ in weights only."""

SHORT_NAMES = {name.partition("/")[2]: name for name in CHECKPOINTS}
"""Short name -> hub id."""
