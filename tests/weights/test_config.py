from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seekvl.models.hybrid import HybridConfig
from seekvl.models.llama import LlamaConfig
from seekvl.models.siglip import SiglipConfig
from seekvl.presets import CHECKPOINTS
from seekvl.runtime import SeekVLError
from seekvl.weights.config import read_config
from seekvl.weights.official_config import read_official, write_official
from seekvl.weights.section import Section
from seekvl.weights.transformers_config import read_transformers, write_transformers

GOLDEN = Path(__file__).parents[1] / "golden"
Copy = Callable[[str], Path]
Edit = Callable[..., None]

SINGLE = "vl1-siglip"
HYBRID = "vl1-hybrid"
TF_SINGLE = "transformers-layout/deepseek_vl"
TF_HYBRID = "transformers-layout/deepseek_vl_hybrid"

PUBLISHED_7B: dict[str, object] = {
    "model_type": "multi_modality",
    "torch_dtype": "float16",
    "aligner_config": {
        "cls": "MlpProjector",
        "model_type": "aligner",
        "params": {
            "depth": 2,
            "input_dim": 1024,
            "n_embed": 4096,
            "projector_type": "low_high_hybrid_split_mlp_gelu",
        },
    },
    "language_config": {
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_hidden_layers": 30,
        "torch_dtype": "float16",
        "vocab_size": 102400,
    },
    "vision_config": {
        "cls": "HybridVisionTower",
        "model_type": "vision",
        "params": {
            "concat_type": "tuple",
            "freeze_high": True,
            "freeze_low": True,
            "high_res_cfg": {
                "ckpt_path": "",
                "image_size": 1024,
                "model_name": "sam_b_downsample",
                "output_dim": 1024,
                "pixel_mean": [0.48145466, 0.4578275, 0.40821073],
                "pixel_std": [0.26862954, 0.26130258, 0.27577711],
                "select_feature": "same",
                "select_layer": -1,
            },
            "low_res_cfg": {
                "ckpt_path": "",
                "image_size": 384,
                "model_name": "siglip_large_patch16_384",
                "output_dim": 1024,
                "pixel_mean": [0.5, 0.5, 0.5],
                "pixel_std": [0.5, 0.5, 0.5],
                "select_feature": "same",
                "select_layer": -1,
            },
        },
    },
}


def test_the_published_7b_config_fills_in_the_dimensions_it_leaves_out() -> None:
    model = read_official(Section(PUBLISHED_7B, where="config.json"))
    assert model == CHECKPOINTS["deepseek-ai/deepseek-vl-7b-chat"].model


def test_a_depth_that_no_network_has_is_refused_before_one_is_built() -> None:
    language = {**PUBLISHED_7B["language_config"], "num_hidden_layers": 100_000}  # type: ignore[dict-item]
    expected = "num_hidden_layers is 100000, expected a whole number of 0 to 1,000"
    with pytest.raises(SeekVLError, match=expected):
        read_official(Section({**PUBLISHED_7B, "language_config": language}, where="config.json"))


def test_official_single_tower() -> None:
    config = read_config(GOLDEN / SINGLE)
    assert config.layout == "official"
    assert config.dtype == torch.float32
    assert isinstance(config.model.vision, SiglipConfig)
    assert config.model.language == LlamaConfig(
        vocab_size=700, width=80, layers=3, heads=5, kv_heads=5, mlp_width=208
    )
    assert (config.model.vision.width, config.model.vision.gelu) == (64, "erf")
    assert config.image.do_normalize
    assert config.model.vision.pixel_mean is None
    assert config.max_tokens == 4096


def test_official_hybrid_overrides() -> None:
    vision = read_config(GOLDEN / HYBRID).model.vision
    assert isinstance(vision, HybridConfig)
    assert vision.high.global_layers == (1, 3)
    assert (vision.high.neck_channels, vision.high.downsample_channels) == (16, (32, 64))
    assert (vision.high.window, vision.high.mlp_width, vision.high.resize_side) == (14, 192, 96)


@pytest.mark.parametrize(("official", "other"), [(SINGLE, TF_SINGLE), (HYBRID, TF_HYBRID)])
def test_both_layouts_of_a_model_say_the_same(official: str, other: str) -> None:
    one, two = read_config(GOLDEN / official), read_config(GOLDEN / other)
    assert two.layout == "transformers"
    assert two.model.language == one.model.language
    assert two.model.adaptor == one.model.adaptor
    assert (two.image.background, two.image.mean) == (one.image.background, one.image.mean)
    if isinstance(one.model.vision, HybridConfig):
        assert two.model == one.model
        assert two.image == one.image


def test_transformers_towers_normalise_so_that_every_preprocessing_mode_fits() -> None:
    config = read_config(GOLDEN / TF_SINGLE)
    assert isinstance(config.model.vision, SiglipConfig)
    assert config.model.vision.pixel_mean == (0.5, 0.5, 0.5)
    assert not config.image.do_normalize


def test_small_hybrids_say_their_window_and_resize(copy: Copy, edit: Edit) -> None:
    folder = copy(HYBRID)
    where = "vision_config.params.high_res_cfg"
    edit(folder / "config.json", f"{where}.window_size", 7)
    edit(folder / "config.json", f"{where}.interpolate_size", 32)
    edit(folder / "config.json", "vision_config.params.low_res_cfg.image_size", 128)
    edit(folder / "processor_config.json", "num_image_tokens", 64)
    vision = read_config(folder).model.vision
    assert isinstance(vision, HybridConfig)
    assert (vision.high.window, vision.high.resize_side, vision.low.grid) == (7, 32, 8)


@pytest.mark.parametrize(("select", "layers"), [(-1, 3), (-2, 2), (2, 2), (0, 3), (9, 3)])
def test_select_layer_shortens_a_tower(copy: Copy, edit: Edit, select: int, layers: int) -> None:
    folder = copy(SINGLE)
    edit(folder / "config.json", "vision_config.params.select_layer", select)
    vision = read_config(folder).model.vision
    assert isinstance(vision, SiglipConfig)
    assert vision.layers == layers


def test_unknown_tower_parameters_are_swallowed_as_by_the_reference(copy: Copy, edit: Edit) -> None:
    folder = copy(SINGLE)
    edit(folder / "config.json", "vision_config.params.output_dim", 1024)
    assert read_config(folder).model == read_config(GOLDEN / SINGLE).model


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters.rope_theta"])
def test_rope_theta_in_both_spellings(copy: Copy, edit: Edit, spelling: str) -> None:
    folder = copy(TF_SINGLE)
    if spelling == "rope_theta":
        edit(folder / "config.json", "text_config.rope_parameters")
    edit(folder / "config.json", f"text_config.{spelling}", 50000.0)
    assert read_config(folder).model.language.rope_theta == 50000.0


def test_the_published_7b_says_the_width_of_its_sam_mlp_twice(copy: Copy, edit: Edit) -> None:
    folder = copy(TF_HYBRID)
    edit(folder / "config.json", "high_res_vision_config.intermediate_size", 192)
    assert read_config(folder).model == read_config(GOLDEN / TF_HYBRID).model


def test_misleading_top_level_tie_is_ignored(copy: Copy, edit: Edit) -> None:
    folder = copy(TF_SINGLE)
    edit(folder / "config.json", "tie_word_embeddings", True)
    assert read_config(folder).model == read_config(GOLDEN / TF_SINGLE).model


@pytest.mark.parametrize(("name", "form"), [("gelu", "erf"), ("gelu_pytorch_tanh", "tanh"), (None, "tanh")])
def test_transformers_gelu(copy: Copy, edit: Edit, name: str | None, form: str) -> None:
    folder = copy(TF_SINGLE)
    if name is None:
        edit(folder / "config.json", "vision_config.hidden_act")
    else:
        edit(folder / "config.json", "vision_config.hidden_act", name)
    vision = read_config(folder).model.vision
    assert isinstance(vision, SiglipConfig)
    assert vision.gelu == form


def test_picture_settings_may_stand_inside_the_processor_config(copy: Copy, edit: Edit) -> None:
    folder = copy(TF_SINGLE)
    text = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text('{"num_image_tokens": 36, "image_processor": ' + text + "}")
    assert read_config(folder) == read_config(GOLDEN / TF_SINGLE)


WRONG = [
    (SINGLE, "config.json", "model_type", "deepseek_vl_v2", "vision_config: model_name is missing"),
    (SINGLE, "config.json", "model_type", "llava", "LLaVA"),
    (SINGLE, "config.json", "model_type", "DeepseekOCR", "DeepSeek-OCR"),
    (SINGLE, "config.json", "model_type", "gpt9", "'gpt9' is not DeepSeek-VL"),
    (SINGLE, "config.json", "model_type", None, "model_type is missing"),
    (SINGLE, "config.json", "gen_vision_config", {}, "Janus"),
    (SINGLE, "config.json", "quantization_config", {}, "quant_method is missing"),
    (SINGLE, "config.json", "torch_dtype", "int8", "'int8' is unknown"),
    (SINGLE, "config.json", "language_config.sliding_window", 512, "unknown keys sliding_window"),
    (SINGLE, "config.json", "language_config.vocab_size", None, "vocab_size is missing"),
    (SINGLE, "config.json", "language_config.vocab_size", "700", "expected a whole number"),
    (SINGLE, "config.json", "language_config.hidden_size", True, "expected a whole number"),
    (SINGLE, "config.json", "language_config.hidden_size", 84, "not divisible by 5"),
    (SINGLE, "config.json", "language_config.head_dim", 128, "head_dim is 128; seekvl computes 16"),
    (SINGLE, "config.json", "language_config.attention_bias", True, "attention_bias is true"),
    (SINGLE, "config.json", "language_config.tie_word_embeddings", True, "tie_word_embeddings is true"),
    (SINGLE, "config.json", "language_config.rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling"),
    (SINGLE, "config.json", "vision_config.cls", "DINOTower", "'DINOTower' is unknown"),
    (SINGLE, "config.json", "vision_config.params", [], "params is [], expected an object"),
    (SINGLE, "config.json", "vision_config.params.model_name", "eva", "'eva' is unknown"),
    (SINGLE, "config.json", "vision_config.params.select_feature", "patch", "select_feature"),
    (SINGLE, "config.json", "vision_config.params.select_layer", -9, "leaves none of the 3 layers"),
    (SINGLE, "config.json", "vision_config.params.heads", 5, "not divisible by its 5 heads"),
    (SINGLE, "config.json", "vision_config.params.pixel_mean", [0.5, 0.5], "three numbers"),
    (SINGLE, "config.json", "vision_config.params.pixel_mean", [0.5, 0.5, 0.5], "both pixel_mean"),
    (SINGLE, "config.json", "aligner_config.params.projector_type", "qformer", "'qformer' is unknown"),
    (SINGLE, "config.json", "aligner_config.params.n_embed", 96, "adaptor makes width 96"),
    (SINGLE, "config.json", "aligner_config.params.gate", 1, "unknown keys gate"),
    (HYBRID, "config.json", "vision_config.params.concat_type", "add", "concat_type"),
    (HYBRID, "config.json", "vision_config.params.high_res_cfg.interpolate_size", 64, "the towers disagree"),
    (HYBRID, "config.json", "vision_config.params.high_res_cfg.downsample_channels", [64], "1 values"),
    (HYBRID, "preprocessor_config.json", "do_normalize", True, "normalised twice"),
    (SINGLE, "preprocessor_config.json", "do_normalize", False, "never be normalised"),
    (SINGLE, "preprocessor_config.json", "do_normalize", "no", "expected true or false"),
    (SINGLE, "preprocessor_config.json", "image_size", 384, "pictures of 384 px"),
    (SINGLE, "preprocessor_config.json", "image_mean", None, "image_mean or image_std is missing"),
    (SINGLE, "preprocessor_config.json", "background_color", [0, 0, 0], "background_color"),
    (SINGLE, "processor_config.json", "num_image_tokens", 576, "num_image_tokens is 576, but"),
    (SINGLE, "processor_config.json", "add_special_token", True, "add_special_token is true"),
    (SINGLE, "processor_config.json", "sft_format", "llama-2", "sft_format 'llama-2' is unknown"),
    (SINGLE, "special_tokens_map.json", "eos_token", "</s>", "eos_token is"),
    (SINGLE, "tokenizer_config.json", "bos_token", 1, "bos_token is 1, expected a string"),
    (TF_SINGLE, "config.json", "text_config.rope_parameters.rope_type", "yarn", "rope_type"),
    (TF_SINGLE, "config.json", "text_config.mlp_bias", True, "mlp_bias"),
    (TF_SINGLE, "config.json", "vision_config.hidden_act", "relu", "'relu' is unknown"),
    (TF_SINGLE, "config.json", "vision_config.rotary", True, "unknown keys rotary"),
    (TF_SINGLE, "preprocessor_config.json", "do_normalize", False, "never be normalised"),
    (TF_SINGLE, "preprocessor_config.json", "do_pad", False, "do_pad is false"),
    (TF_SINGLE, "preprocessor_config.json", "size", {"height": 96, "width": 90}, "is no square"),
    (TF_SINGLE, "preprocessor_config.json", "background_color", [999, 0, 0], "three values of 0..255"),
    (TF_HYBRID, "config.json", "high_res_vision_config.use_rel_pos", False, "use_rel_pos"),
    (TF_HYBRID, "config.json", "high_res_vision_config.intermediate_size", 191, "computes 192 only"),
    (TF_HYBRID, "preprocessor_config.json", "resample", 3, "2 (bilinear)"),
    (TF_HYBRID, "preprocessor_config.json", "high_res_size", {"height": 512, "width": 512}, "512 px"),
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


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "processor_config.json"])
def test_missing_files_are_named(copy: Copy, file: str) -> None:
    folder = copy(SINGLE)
    (folder / file).unlink()
    with pytest.raises(SeekVLError, match=f"has no {file}"):
        read_config(folder)


BROKEN = [
    (b"", "is empty"),
    (b'{"model_type": ', "is not JSON"),
    (b"[1]", "holds a JSON list"),
    (b"\xff\xfe", "UTF-8"),
    (b'{"model_type": ' + b"9" * 5000 + b"}", "is not JSON that can be read"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_broken_json_is_named(copy: Copy, content: bytes, message: str) -> None:
    folder = copy(SINGLE)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(SeekVLError, match=message):
        read_config(folder)


def test_a_hybrid_cannot_be_normalised_before_its_low_picture_is_made(copy: Copy, edit: Edit) -> None:
    folder = copy(HYBRID)
    for tower in ("high_res_cfg", "low_res_cfg"):
        for key in ("pixel_mean", "pixel_std"):
            edit(folder / "config.json", f"vision_config.params.{tower}.{key}")
    edit(folder / "preprocessor_config.json", "do_normalize", True)
    with pytest.raises(SeekVLError, match="un-normalised"):
        read_config(folder)


@pytest.mark.parametrize("name", [SINGLE, HYBRID])
def test_official_config_survives_writing(name: str) -> None:
    model = read_config(GOLDEN / name).model
    written = write_official(model, dtype="float32")
    assert read_official(Section(written, where="config.json")) == model


def test_published_config_is_written_with_its_own_keys() -> None:
    written = write_official(CHECKPOINTS["deepseek-ai/deepseek-vl-7b-chat"].model, dtype="float16")
    assert written["vision_config"] == PUBLISHED_7B["vision_config"]
    assert written["aligner_config"] == PUBLISHED_7B["aligner_config"]


@pytest.mark.parametrize("name", [TF_SINGLE, TF_HYBRID])
def test_transformers_config_survives_writing(name: str) -> None:
    folder = GOLDEN / name
    model = read_transformers(Section.of_file(folder / "config.json"))
    written = write_transformers(model, dtype="float32", image_id=1, bos_id=2, eos_id=3)
    assert read_transformers(Section(written, where="config.json")) == model
