from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seekvl.processing.tokenizer import EOS, IMAGE
from seekvl.runtime import SeekVLError
from seekvl.weights import load as room
from seekvl.weights.load import find_folder, load_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
Copy = Callable[[str], Path]
Edit = Callable[..., None]


def test_a_loaded_checkpoint_is_ready_to_use() -> None:
    checkpoint = load_checkpoint(GOLDEN / "vl1-siglip", device="cpu")
    assert not checkpoint.model.training
    assert not any(parameter.requires_grad for parameter in checkpoint.model.parameters())
    assert {parameter.dtype for parameter in checkpoint.model.parameters()} == {torch.float32}
    assert checkpoint.processor.max_tokens == 4096
    assert checkpoint.processor.preprocessing == "seekvl"
    assert checkpoint.folder == GOLDEN / "vl1-siglip"
    assert checkpoint.processor("hi").input_ids[0] == checkpoint.processor.tokenizer.bos_id


def test_max_tokens_may_be_raised_to_the_positions_there_are() -> None:
    assert (
        load_checkpoint(GOLDEN / "vl1-siglip", max_tokens=16384, device="cpu").processor.max_tokens == 16384
    )


@pytest.mark.parametrize("limit", [0, -1, 16385])
def test_max_tokens_out_of_range(limit: int) -> None:
    with pytest.raises(SeekVLError, match=rf"max_tokens {limit} is no whole number of 1\.\.16384"):
        load_checkpoint(GOLDEN / "vl1-siglip", max_tokens=limit, device="cpu")


def test_context_is_never_longer_than_the_positions(copy: Copy, edit: Edit) -> None:
    folder = copy("vl1-siglip")
    edit(folder / "config.json", "language_config.max_position_embeddings", 512)
    assert load_checkpoint(folder, device="cpu").processor.max_tokens == 512


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "no-such-model", "a/b/c", "~/no-such-folder-here", ""]
)
def test_a_path_that_does_not_exist_is_never_downloaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_download", _no_download)
    if name == "":
        name = "no such name"
    with pytest.raises(SeekVLError, match="there is no folder"):
        find_folder(name)


def _no_download(repository: str, *, revision: str | None) -> Path:
    raise AssertionError(f"tried to download {repository}")


def test_a_missing_folder_inside_an_existing_one_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SeekVLError, match="there is no folder 'checkpoints/step_100'"):
        find_folder("checkpoints/step_100")
    with pytest.raises(SeekVLError, match="there is no folder"):
        find_folder(Path("org/name"))


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("deepseek-vl-1.3b-chat", "deepseek-ai/deepseek-vl-1.3b-chat"),
        ("deepseek-ai/deepseek-vl-7b-base", "deepseek-ai/deepseek-vl-7b-base"),
        ("deepseek-community/deepseek-vl-7b-chat", "deepseek-community/deepseek-vl-7b-chat"),
    ],
)
def test_published_names_are_hub_ids(
    name: str, repository: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, *, revision: str | None) -> Path:
        asked.append((repository, revision))
        return tmp_path

    monkeypatch.setattr(room, "_download", download)
    assert find_folder(name, revision="main") == tmp_path
    assert asked == [(repository, "main")]


def test_offline_and_not_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SeekVLError, match="not in the local hub cache and the hub cannot be reached"):
        find_folder("nobody/has-this-model")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SeekVLError, match="is a file; give the folder"):
        find_folder(tmp_path / "model.safetensors")


def test_a_folder_has_no_revisions() -> None:
    with pytest.raises(SeekVLError, match="revision 'v1' was given for the folder"):
        find_folder(GOLDEN / "vl1-siglip", revision="v1")
    with pytest.raises(SeekVLError, match="revision 'v1' was given for the bundled seekvl-nano"):
        find_folder("seekvl-nano", revision="v1")


@pytest.mark.parametrize(("name", "verb"), [("seekvl-nano", "nano"), ("seekvl-nano-moe", "nano-moe")])
def test_a_bundled_model_missing_from_an_installation(
    name: str, verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(room.BUNDLED, name, tmp_path)
    with pytest.raises(SeekVLError, match=f"{name} is not in this installation .*seekvl train {verb} --out"):
        find_folder(name)
    (tmp_path / "config.json").write_text("{}")
    assert find_folder(name) == find_folder(Path(name)) == tmp_path


def test_no_tokenizer(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SeekVLError, match=r"has no tokenizer\.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("token", [IMAGE, EOS])
def test_tokenizer_without_a_special(copy: Copy, token: str) -> None:
    folder = copy("vl1-siglip")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(token, "<other>"), encoding="utf-8")
    with pytest.raises(SeekVLError, match="has no special token"):
        load_checkpoint(folder)


def test_tokenizer_of_a_larger_model(copy: Copy, edit: Edit) -> None:
    folder = copy("vl1-siglip")
    edit(folder / "config.json", "language_config.vocab_size", 600)
    with pytest.raises(SeekVLError, match="ids go up to 683, but the model has 600 embedding rows"):
        load_checkpoint(folder)


def test_image_token_of_config_and_tokenizer_differ(copy: Copy, edit: Edit) -> None:
    folder = copy("transformers-layout/deepseek_vl")
    edit(folder / "config.json", "image_token_id", 5)
    with pytest.raises(SeekVLError, match=r"has id 682, but config\.json says image_token_id 5"):
        load_checkpoint(folder)


def test_nothing_is_read_when_the_config_is_wrong(copy: Copy, edit: Edit) -> None:
    folder = copy("vl1-siglip")
    (folder / "model.safetensors").unlink()
    edit(folder / "config.json", "model_type", "llava")
    with pytest.raises(SeekVLError, match="LLaVA"):
        load_checkpoint(folder)
