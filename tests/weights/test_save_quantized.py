import json
from pathlib import Path

import pytest
import torch

from seekvl.runtime import SeekVLError
from seekvl.weights import save_quantized as room
from seekvl.weights.load import Checkpoint, load_checkpoint
from seekvl.weights.read_quantized import stored_matrices
from seekvl.weights.save_quantized import save_quantized

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(GOLDEN / "vl1-siglip", device="cpu", dtype="float32")


def save(checkpoint: Checkpoint, folder: Path, **changes: object) -> None:
    arguments = {
        "config": checkpoint.config,
        "tokenizer": checkpoint.folder / "tokenizer.json",
        "kind": "int4",
    }
    save_quantized(checkpoint.model, folder, **arguments | changes)  # type: ignore[arg-type]


def test_the_folder_says_what_it_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    arguments = {"config": checkpoint.config, "tokenizer": checkpoint.folder / "tokenizer.json"}
    matrices = save_quantized(checkpoint.model, folder, kind="int4", dtype=torch.bfloat16, **arguments)
    assert stored_matrices(folder, kind="int4") == matrices
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "seekvl", "version": 1, "format": "int4"}
    assert config["torch_dtype"] == "bfloat16"
    model = load_checkpoint(folder, device="cpu", dtype="bfloat16").model
    assert model.language.norm.weight.dtype == torch.bfloat16
    assert not checkpoint.model.language.lm_head.weight.isnan().any()


def test_what_stands_there_is_replaced_on_purpose_only(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save(checkpoint, tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(SeekVLError, match="already holds a checkpoint"):
        save(checkpoint, tmp_path)
    save(checkpoint, tmp_path, overwrite=True, kind="int8")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert load_checkpoint(tmp_path, device="cpu").config.quantization == "int8"


def test_a_folder_that_fails_has_no_config(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoint, tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "_append", fail)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoint, tmp_path, overwrite=True)
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob(".*")), "no half-written file is left"


def test_what_cannot_be_saved(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = load_checkpoint(GOLDEN / "vl2-tiny-like", device="cpu")
    with pytest.raises(SeekVLError, match="describes another model"):
        save(checkpoint, tmp_path / "a", config=other.config)
    with pytest.raises(SeekVLError, match="weights are saved as float32, bfloat16, float16, not"):
        save(checkpoint, tmp_path / "a", dtype=torch.float64)
    with pytest.raises(SeekVLError, match="there is no tokenizer"):
        save(checkpoint, tmp_path / "a", tokenizer=tmp_path / "none.json")
    with pytest.raises(SeekVLError, match="quantize='int3' is unknown"):
        save(checkpoint, tmp_path / "a", kind="int3")
    assert not (tmp_path / "a" / "config.json").exists()
