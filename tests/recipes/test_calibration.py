from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

import seekvl
from seekvl.recipes.calibration import QUESTIONS, calibration_passages, drawn, of_folder
from seekvl.runtime import SeekVLError
from seekvl.vlm import VLM
from seekvl.weights.calibrate import calibrated_parts
from seekvl.weights.quantize import quantize_model


@cache
def nano() -> VLM:
    return seekvl.load(device="cpu", dtype="float32")


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        Image.new("RGB", (60, 40), (200, 30, 40)).save(folder / name)


def test_passages_are_what_was_asked_and_answered() -> None:
    told: list[tuple[int, int]] = []
    passages = calibration_passages(nano(), "drawn", n=3, progress=lambda *done: told.append(done))
    assert told[-1] == (3, 3)
    for conversation, passage in zip(drawn(3, seed=0), passages, strict=True):
        inputs, answer = nano().processor(conversation), nano().chat(conversation)
        assert passage.places == len(answer.token_ids) + 1
        assert len(passage.embeds) == len(inputs.input_ids) + len(answer.token_ids)
        assert int(inputs.image_mask.sum()) >= 100, "a picture is among the words"
        model = nano().model
        with torch.no_grad():
            ids = model.head(model.hidden(passage.embeds[None]))[0, -passage.places :].argmax(dim=1).tolist()
        assert ids == [*answer.token_ids, nano().tokenizer.eos_id]


def test_an_answer_that_is_cut_short_has_no_end() -> None:
    """Its last token has no place behind it, whose next token nobody chose."""
    from seekvl.recipes import calibration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "LONGEST", 2)
        passages = calibration_passages(nano(), "drawn", n=12)
    assert max(passage.places for passage in passages) == 2


def test_rounding_by_drawn_pictures_keeps_logits_nearer() -> None:
    """int4, all matrices of nano: other pictures than those it was rounded by."""
    by_itself, calibrated = (seekvl.load(device="cpu", dtype="float32") for _ in range(2))
    quantize_model(by_itself.model, "int4", smallest=0)
    passages = calibration_passages(calibrated, "drawn", n=48)
    parts = calibrated_parts(calibrated.model, "int4", passages, smallest=0)
    matrices = quantize_model(calibrated.model, "int4", parts=parts)
    assert {matrix.kind for matrix in matrices if matrix.name.startswith("language.")} == {"int4"}
    others = calibration_passages(nano(), "drawn", n=8, seed=5)
    off = []
    for model in (by_itself.model, calibrated.model):
        wrong = 0.0
        for passage in others:
            with torch.no_grad():
                rows = (m.head(m.hidden(passage.embeds[None]))[0] for m in (nano().model, model))
                plain, other = (row[-passage.places :].log_softmax(dim=1) for row in rows)
            wrong += float((plain.exp() * (plain - other)).sum())
        off.append(wrong)
    assert off[1] < 0.7 * off[0]


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    pictures(tmp_path, "b.png", "a.png", "c.jpg")
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / "b.txt").write_text("What colour is it?\n", encoding="utf-8")
    asked = of_folder(tmp_path, n=None)
    texts = [part.text for one in asked for part in one.messages[0].parts if hasattr(part, "text")]
    assert [text.strip() for text in texts] == [QUESTIONS[0], "What colour is it?", QUESTIONS[2]]
    assert len(of_folder(tmp_path, n=2)) == 2
    passages = calibration_passages(nano(), tmp_path)
    assert len(passages) == 3
    assert all(passage.places > 0 for passage in passages)


def test_bad_folders_and_numbers(tmp_path: Path) -> None:
    with pytest.raises(SeekVLError, match=r"there is no folder .*nowhere to calibrate by"):
        calibration_passages(nano(), tmp_path / "nowhere")
    pictures(tmp_path, "a.png")
    with pytest.raises(SeekVLError, match=r"holds 1 pictures .* needs 2"):
        calibration_passages(nano(), tmp_path)
    (tmp_path / "a.txt").write_text(" ")
    pictures(tmp_path, "b.png")
    with pytest.raises(SeekVLError, match=r"a.txt is empty: write the question about a.png"):
        calibration_passages(nano(), tmp_path)
    for n in (1, 0, -3, 2.5):
        with pytest.raises(SeekVLError, match="take 2 or more"):
            calibration_passages(nano(), "drawn", n=n)  # type: ignore[arg-type]
