import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.mla import MlaConfig
from seekvl.models.vl2 import VL2Config
from seekvl.presets import CHECKPOINTS
from seekvl.processing.template import DEEPSEEK_VL2
from seekvl.processing.tile_image import GRIDS_9, TileImageConfig
from seekvl.processing.tokenizer import VL2_ADDED
from seekvl.runtime import SeekVLError
from seekvl.weights.config import read_config
from seekvl.weights.official_vl2_config import read_vl2, write_vl2
from seekvl.weights.section import Section

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ["vl2-tiny-like", "vl2-small-like", "vl2-base-like"]
SIZES = ["vl2-tiny", "vl2-small", "vl2"]
Copy = Callable[[str], Path]
Edit = Callable[..., None]

CANDIDATES = [[384 * columns, 384 * rows] for columns, rows in GRIDS_9]


def published(name: str) -> dict[str, Any]:
    """The `config.json` of a size as it is known, with the bookkeeping published files have."""
    keys = GOLDEN / "keys" / f"{name}.official.json.gz"
    config: dict[str, Any] = json.loads(gzip.decompress(keys.read_bytes()))["config"]
    config["language_config"] |= {"model_type": "deepseek_v2", "torch_dtype": "bfloat16", "lm_head": False}
    config["language_config"] |= {
        "rm_head": False,
        "auto_map": {},
        "architectures": ["DeepseekV2ForCausalLM"],
    }
    config["vision_config"] |= {"model_type": "vision"}
    config["projector_config"] |= {"model_type": "mlp_projector"}
    return config | {
        "candidate_resolutions": CANDIDATES,
        "global_view_pos": "head",
        "model_type": "deepseek_vl_v2",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.2",
    }


def read(config: Mapping[str, object]) -> VL2Config:
    return read_vl2(Section(config, where="config.json"))[0]


@pytest.mark.parametrize("name", SIZES)
def test_a_published_config_is_its_preset(name: str) -> None:
    """Base leaves layers, heads and all widths of its attention to defaults."""
    model, grids = read_vl2(Section(published(name), where="config.json"))
    assert model == CHECKPOINTS[f"deepseek-ai/deepseek-{name}"].model
    assert grids == GRIDS_9


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_may_leave_out_what_has_no_default(name: str) -> None:
    config = published(name)
    del config["tile_tag"], config["language_config"]["topk_method"]
    assert read(config) == CHECKPOINTS[f"deepseek-ai/deepseek-{name}"].model


def test_other_sizes_may_not() -> None:
    for where, key in ((None, "tile_tag"), ("language_config", "topk_method")):
        config = published("vl2")
        config["language_config"]["intermediate_size"] = 12289
        del (config if where is None else config[where])[key]
        with pytest.raises(SeekVLError, match=f"{key} is missing"):
            read(config)


@pytest.mark.parametrize("name", SIZES)
def test_a_config_survives_writing(name: str) -> None:
    model = CHECKPOINTS[f"deepseek-ai/deepseek-{name}"].model
    assert isinstance(model, VL2Config)
    written = write_vl2(model, grids=GRIDS_9, dtype="bfloat16")
    assert read_vl2(Section(written, where="config.json")) == (model, GRIDS_9)
    assert json.loads(json.dumps(written)) == written
    for part in ("vision_config", "projector_config"):
        wanted = published(name)[part]
        found = written[part]
        assert isinstance(found, dict)
        assert {key: found[key] for key in wanted} == wanted


def test_dense_models_and_tails_survive_writing() -> None:
    model = CHECKPOINTS["deepseek-ai/deepseek-vl2-tiny"].model
    assert isinstance(model, VL2Config)
    other = replace(model, language=replace(model.language, moe=None), global_first=False)
    written = write_vl2(other, grids=GRIDS_9, dtype="bfloat16")
    assert read_vl2(Section(written, where="config.json"))[0] == other
    with pytest.raises(SeekVLError, match="cannot say a tower with gelu 'erf'"):
        write_vl2(replace(model, vision=replace(model.vision, gelu="erf")), grids=GRIDS_9, dtype="float32")


def test_a_folder_as_a_whole() -> None:
    config = read_config(GOLDEN / "vl2-base-like")
    assert (config.layout, config.dtype, config.max_tokens) == ("official", torch.float32, 4096)
    assert isinstance(config.model, VL2Config)
    assert isinstance(config.image, TileImageConfig)
    assert config.template == DEEPSEEK_VL2
    assert config.specials.added == VL2_ADDED
    assert (config.image.image_size, config.image.grids) == (84, GRIDS_9)
    language = config.model.language
    assert isinstance(language, DeepseekV2Config)
    assert language.mla == MlaConfig(kv_rank=28, nope_width=16, rope_width=8, value_width=16)
    assert language.moe is not None
    assert (language.moe.choice, language.moe.groups, language.moe.scale) == ("noaux_tc", 4, 2.5)


def test_plain_attention_ignores_the_widths_of_the_latent(copy: Copy, edit: Edit) -> None:
    folder = copy("vl2-tiny-like")
    for key in ("q_lora_rank", "qk_nope_head_dim", "v_head_dim"):
        edit(folder / "config.json", f"language_config.{key}")
    assert read_config(folder).model == read_config(GOLDEN / "vl2-tiny-like").model


TINY, SMALL, BASE = FOLDERS
OCR_WIDTH = {"clip-l-14-224": {"heads": 16}, "sam_vit_b": {"heads": 12}}

WRONG = [
    (TINY, "config.json", "vision_config.model_name", "deeplip_b_l", "DeepSeek-OCR"),
    (TINY, "config.json", "vision_config.model_name", "eva", "'eva' is unknown"),
    (TINY, "config.json", "vision_config.width", OCR_WIDTH, "expected a whole number"),
    (TINY, "config.json", "vision_config.ignore_head", False, "ignore_head is false"),
    (TINY, "config.json", "vision_config.register_tokens", 4, "unknown keys register_tokens"),
    (TINY, "config.json", "tile_tag", None, "tile_tag is missing"),
    (TINY, "config.json", "tile_tag", "1D", "tile_tag is '1D'; only '2D' can be run"),
    (TINY, "config.json", "global_view_pos", "middle", "expected 'head' or 'tail'"),
    (TINY, "config.json", "quantization_config", {}, "quant_method is missing"),
    (TINY, "config.json", "candidate_resolutions", None, "candidate_resolutions is missing"),
    (TINY, "config.json", "candidate_resolutions", [[104]], "a list of pairs"),
    (TINY, "config.json", "candidate_resolutions", [[104, 104], [200, 104]], "tiles of 104 px do not fill"),
    (TINY, "config.json", "candidate_resolutions", [[208, 104], [104, 104]], "must be one tile"),
    (TINY, "config.json", "candidate_resolutions", [[104, 104]], "differ from those of config.json"),
    (TINY, "config.json", "projector_config.projector_type", "qformer", "'qformer' is unknown"),
    (TINY, "config.json", "projector_config.n_embed", 72, "the adaptor makes width 72"),
    (TINY, "config.json", "projector_config.gate", 1, "unknown keys gate"),
    (TINY, "config.json", "language_config.topk_method", "gready", "topk_method 'gready' is unknown"),
    (TINY, "config.json", "language_config.topk_method", None, "topk_method is missing"),
    (TINY, "config.json", "language_config.scoring_func", "relu", "scoring_func 'relu' is unknown"),
    (TINY, "config.json", "language_config.num_experts_per_tok", None, "num_experts_per_tok is missing"),
    (TINY, "config.json", "language_config.num_experts_per_tok", 9, "9 active experts of 8"),
    (TINY, "config.json", "language_config.sliding_window", 5, "unknown keys sliding_window"),
    (TINY, "config.json", "language_config.rope_scaling", {"type": "yarn"}, "rope_scaling is"),
    (SMALL, "config.json", "language_config.q_lora_rank", 1536, "q_lora_rank is 1536: queries of low rank"),
    (SMALL, "config.json", "language_config.kv_lora_rank", None, "kv_lora_rank is null, but use_mla is true"),
    (SMALL, "config.json", "language_config.num_key_value_heads", 2, "kv_heads 2 cannot be"),
    (BASE, "config.json", "language_config.n_group", 5, "12 experts do not make 5 equal groups"),
    (BASE, "processor_config.json", "normalize", False, "normalize is false"),
    (BASE, "processor_config.json", "patch_size", 16, "patch_size is 16, but config.json builds a network"),
    (BASE, "processor_config.json", "downsample_ratio", 1, "downsample_ratio is 1, but config.json"),
    (BASE, "processor_config.json", "candidate_resolutions", [[84, 84]], "differ from those of config.json"),
    (BASE, "processor_config.json", "sft_format", "plain", "sft_format 'plain' is unknown"),
    (BASE, "processor_config.json", "sharpen", True, "unknown keys sharpen"),
    (BASE, "processor_config.json", "image_mean", [0.5], "three numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "where", "value", "message"), WRONG)
def test_contradictions_are_refused_in_one_line(
    copy: Copy, edit: Edit, name: str, file: str, where: str, value: object, message: str
) -> None:
    folder = copy(name)
    edit(folder / file, where, value)
    with pytest.raises(SeekVLError) as caught:
        read_config(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_q_lora_rank_is_not_null(copy: Copy, edit: Edit) -> None:
    folder = copy("vl2-small-like")
    edit(folder / "config.json", "language_config.q_lora_rank")
    with pytest.raises(SeekVLError, match="q_lora_rank is missing, which means 1536"):
        read_config(folder)


def test_no_processor_config(copy: Copy) -> None:
    folder = copy("vl2-small-like")
    (folder / "processor_config.json").unlink()
    with pytest.raises(SeekVLError, match=r"has no processor_config\.json"):
        read_config(folder)
