"""Many questions in one call."""

import json
from pathlib import Path

import pytest

import seekvl
from tests.cli.conftest import GOLDEN, Run

PICTURE = GOLDEN / "images" / "text_320x200.png"
SHORT = ("--max-new-tokens", "4")


def test_answers_are_lines_of_json(run: Run, model: tuple[str, ...], tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": "a", "images": [str(PICTURE)], "question": "What is it?"}, {"id": "b", "question": "Hi."}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("ask", "--batch", source, "--out", out, *SHORT, *model)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert result.stderr == "answered 2 of 2\n"
    found = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    expected = seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="float32").ask(
        PICTURE, "What is it?", max_new_tokens=4
    )
    assert list(found["a"]) == ["id", "text", "token_ids", "boxes", "finish_reason", "usage", "timings"]
    assert found["a"]["token_ids"] == expected.token_ids
    again = run("ask", "--batch", source, "--out", out, *SHORT, *model)
    assert again.stderr == "answered 2 of 2, 2 of them before\n"


def test_one_question_about_a_folder_and_a_failure(run: Run, model: tuple[str, ...], tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    folder.mkdir()
    (folder / "good.png").write_bytes(PICTURE.read_bytes())
    (folder / "bad.png").write_bytes(b"no picture")
    result = run("ask", "--batch", folder, "--out", out, "What is it?", *SHORT, *model)
    assert result.exit_code == 1
    assert "answered 1 of 2, 1 failed" in result.stderr
    assert f"see {out}.failed" in result.stderr
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["good.png"]
    assert json.loads(Path(f"{out}.failed").read_text())["id"] == "bad.png"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--out", "out.jsonl"), "together"),
        (("--batch", "."), "together"),
        (("--batch", ".", "--out", "nowhere/out.jsonl", "What?"), "does not exist"),
        (("--batch", ".", "--out", "out.jsonl", "picture.png", "What?"), "no meaning with --batch"),
        (("--batch", ".", "--out", "out.jsonl", "--json", "What?"), "no meaning with --batch"),
        (("--batch", "missing.jsonl", "--out", "out.jsonl"), "does not exist"),
        ((), "no question"),
    ],
)
def test_a_wrong_call_is_told_before_anything_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("ask", *options)
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.replace("│", " ").split())
