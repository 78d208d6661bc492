import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import seekvl
from seekvl.engine.plan import find_config
from seekvl.evals import random_weights
from seekvl.evals.random_weights import SPECIALS, TOKENIZERS, quantise_beside, write_random
from seekvl.evals.speed_process import question
from seekvl.models.vl2 import VL2Config
from seekvl.presets import CHECKPOINTS, VL2_BASE, VL2_TINY, VL_1B, Preset
from seekvl.runtime import SeekVLError
from seekvl.weights.load import open_tokenizer
from seekvl.weights.self_check import SELFCHECK

GOLDEN = Path(__file__).parents[1] / "golden"
VL2_FOLDER = SELFCHECK / "vl2-small-like"


def small(kind: Preset, folder: Path) -> Preset:
    """A preset of this kind with the dimensions of a miniature."""
    config = find_config(folder)
    return replace(kind, model=config.model, image=config.image)


@pytest.mark.parametrize(("kind", "folder"), [(VL_1B, GOLDEN / "vl1-siglip"), (VL2_TINY, VL2_FOLDER)])
def test_random_weights_load_and_answer(kind: Preset, folder: Path, tmp_path: Path) -> None:
    preset, tokenizer = small(kind, folder), folder / "tokenizer.json"
    write_random(preset, tmp_path / "made", tokenizer=tokenizer)
    vlm = seekvl.load(tmp_path / "made", device="cpu", dtype="float32")
    assert vlm.config.language == preset.model.language
    assert vlm.config.adaptor == preset.model.adaptor
    vlm.tokenizer.eos_id = -1
    answer = vlm.chat(question(vlm.processor), max_new_tokens=3)
    assert len(answer.token_ids) == 3
    assert answer.usage.prompt_tokens - answer.usage.image_tokens >= 54
    with pytest.raises(SeekVLError, match="already holds a checkpoint"):
        write_random(preset, tmp_path / "made", tokenizer=tokenizer)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_published_model_has_a_tokenizer_that_fits(name: str) -> None:
    tiled = isinstance(CHECKPOINTS[name].model, VL2Config)
    config = replace(find_config(name), specials=SPECIALS[tiled])
    assert open_tokenizer(TOKENIZERS[tiled], config).vocab_size > 500


def test_weights_that_fit_nowhere_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "free_bytes", lambda device: 2**30)
    with pytest.raises(SeekVLError, match=r"take 5\d\.\d GiB, the free memory has 1\.0 GiB"):
        write_random(VL2_BASE, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_quantised_weights_stand_beside_and_are_taken_again(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(GOLDEN / "vl1-siglip", folder)
    made = quantise_beside(folder, "int8", dtype="float32")
    assert made == tmp_path / "plain-int8"
    assert find_config(made).quantization == "int8"
    written = (made / "model.safetensors").stat().st_mtime_ns
    assert quantise_beside(folder, "int8", dtype="float32") == made
    assert (made / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(SeekVLError, match=r"plain-int8 holds something else than .*plain in int4"):
        quantise_beside(folder, "int4", dtype="float32", target=made)
    shutil.copytree(GOLDEN / "vl1-hybrid", tmp_path / "other")
    with pytest.raises(SeekVLError, match="holds something else"):
        quantise_beside(tmp_path / "other", "int8", dtype="float32", target=made)
