"""One question, one answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import seekvl
from seekvl.cli import ask
from seekvl.processing.grounding import Box
from tests.cli.conftest import GOLDEN, Run

IMAGES = GOLDEN / "images"
PICTURES = (IMAGES / "exif6_120x80.png", IMAGES / "text_320x200.png")
SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def vlm() -> seekvl.VLM:
    return seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="float32")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_json_is_the_answer_of_the_library(
    run: Run, model: tuple[str, ...], vlm: seekvl.VLM, count: int
) -> None:
    result = run("ask", *PICTURES[:count], "What is it?", "--json", *SHORT, *model)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    expected = vlm.ask(list(PICTURES[:count]), "What is it?", max_new_tokens=6)
    assert list(said) == ["text", "token_ids", "boxes", "finish_reason", "usage", "timings"]
    assert (said["text"], said["token_ids"]) == (expected.text, expected.token_ids)
    assert said["finish_reason"] == expected.finish_reason
    assert said["usage"]["image_tokens"] == 36 * count
    assert said["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert set(said["timings"]) == {"preprocess", "vision", "prefill", "decode"}


def test_text_goes_to_stdout_and_costs_to_stderr(run: Run, model: tuple[str, ...], vlm: seekvl.VLM) -> None:
    result = run("ask", PICTURES[1], "What is it?", "--verbose", *SHORT, *model)
    expected = vlm.ask(PICTURES[1], "What is it?", max_new_tokens=6)
    assert result.exit_code == 0
    assert result.stdout == expected.text.strip() + "\n"
    assert "prompt 160 tokens" not in result.stdout
    assert f"prompt {expected.usage.prompt_tokens} tokens (36 of pictures" in result.stderr
    assert "decode" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_the_text_streams_and_is_the_same(model: tuple[str, ...], vlm: seekvl.VLM) -> None:
    import pty

    master, slave = pty.openpty()
    code = "from seekvl.cli.main import app; app()"
    command = [sys.executable, "-c", code, "ask", str(PICTURES[1]), "Hi", *SHORT]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *model], stdout=slave, stderr=slave, env=environment, check=True)
    os.close(slave)
    said = os.read(master, 100_000).decode()
    os.close(master)
    *notes, text = said.split("\r\033[K")
    assert notes == [f"loading {GOLDEN / 'vl1-siglip'} ...", "reading the prompt ..."]
    assert text.strip() == vlm.ask(PICTURES[1], "Hi", max_new_tokens=6).text.strip()


def test_dash_reads_the_picture_from_stdin(run: Run, model: tuple[str, ...]) -> None:
    ids = []
    for name, stdin in (("-", PICTURES[1].read_bytes()), (PICTURES[1], b"")):
        result = run("ask", name, "What?", "--json", *SHORT, *model, stdin=stdin)
        ids.append(json.loads(result.stdout)["token_ids"])
    assert ids[0] == ids[1]


def test_sampling_options_reach_the_engine(run: Run, model: tuple[str, ...], vlm: seekvl.VLM) -> None:
    options = ("--temperature", "1.5", "--top-p", "0.9", "--top-k", "50", "--repetition-penalty", "1.3")
    result = run("ask", "Hello", "--json", *SHORT, "--seed", "3", *options, *model)
    expected = vlm.ask(
        [], "Hello", max_new_tokens=6, temperature=1.5, top_p=0.9, top_k=50, repetition_penalty=1.3, seed=3
    )
    assert json.loads(result.stdout)["token_ids"] == expected.token_ids


def test_system_prompt_and_preprocessing_count(run: Run, model: tuple[str, ...]) -> None:
    asked = ("ask", PICTURES[0], "What?", "--json", *SHORT, *model)
    plain = json.loads(run(*asked).stdout)
    without = json.loads(run(*asked, "--system", "").stdout)
    official = json.loads(run(*asked, "--preprocessing", "official").stdout)
    assert without["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"]
    assert official["token_ids"] != plain["token_ids"]


def test_stop_string_ends_the_answer(run: Run, model: tuple[str, ...], vlm: seekvl.VLM) -> None:
    whole = vlm.ask([], "Hello", max_new_tokens=30).text
    stop = next(letter for letter in whole[3:] if letter.isalpha())
    said = json.loads(run("ask", "Hello", "--json", "--stop", "never", "--stop", stop, *model).stdout)
    assert said["finish_reason"] == "stop"
    assert said["text"] == whole[: whole.index(stop)]


def test_no_box_is_an_error_that_draws_nothing(run: Run, model: tuple[str, ...], tmp_path: Path) -> None:
    result = run("ask", PICTURES[1], "What?", "--draw", tmp_path / "out.png", *SHORT, *model)
    assert result.exit_code == 1
    assert result.stderr == "error: no box in the answer: nothing was drawn\n"
    assert list(tmp_path.iterdir()) == []


def test_boxes_are_drawn_on_the_picture_they_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [Image.new("RGB", (40, 30)), Image.new("RGB", (60, 50))]
    path = tmp_path / "out.jpg"
    ask._draw(path, [Box("dog", 100, 100, 900, 900, 1)], pictures=pictures, names=["a.png", "b.png"])
    assert capsys.readouterr().err == f"drew 1 box of b.png into {path}\n"
    with Image.open(path) as drawn:
        assert (drawn.size, drawn.format) == ((60, 50), "JPEG")
        assert drawn.getbbox() is not None  # no longer all black
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jpg"]


def test_an_svg_is_drawn_where_its_name_says_so(tmp_path: Path) -> None:
    path = tmp_path / "out.SVG"
    ask._draw(path, [Box("狗 <", 100, 100, 900, 900)], pictures=[Image.new("RGB", (40, 30))], names=["a.png"])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<svg ")
    assert "狗 &lt; 100 100 900 900" in text


def test_boxes_are_in_the_picture_that_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    boxes: list[Box] = []
    monkeypatch.setattr(ask, "_draw", lambda path, found, **_: boxes.extend(found))
    asked = ("ask", PICTURES[0], PICTURES[1], "Where is the sign?", "--draw", tmp_path / "a.png")
    for option, number in ((("--boxes-in", 1), 1), ((), 2)):  # by default in the last one
        result = run(*asked, *option, "--constrain", "box_first", "--max-new-tokens", 60)
        assert result.exit_code == 0, result.output
        assert f"px of picture {number}" in result.stdout
        assert {box.image for box in boxes} == {number - 1}
        boxes.clear()


def test_boxes_in_two_pictures_are_not_drawn_into_one(tmp_path: Path) -> None:
    boxes = [Box("dog", 1, 1, 9, 9, image) for image in (0, 1)]
    with pytest.raises(seekvl.SeekVLError, match="lie in 2 pictures"):
        ask._draw(tmp_path / "a.png", boxes, pictures=[Image.new("RGB", (9, 9))] * 2, names=["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((str(PICTURES[0]),), "is a picture"),
        ((str(PICTURES[0]), " "), "the question is empty"),
        (("-", "-", "What?"), "given twice"),
        (("What?", "--draw", "a.png"), "no picture to draw on"),
        ((str(PICTURES[0]), "What?", "--draw", "a.txt"), "must end in .png"),
        ((str(PICTURES[0]), "What?", "--boxes-in", "2"), "more than the 1 given pictures"),
        ((str(PICTURES[0]), "What?", "--constrain", "box"), "box_first"),
        ((str(PICTURES[0]), "What?", "--draw", "nowhere/a.png"), "folder nowhere"),
        ((str(PICTURES[0]), "What?", "--preprocessing", "best"), "best"),
        ((str(PICTURES[0]), "What?", "--dtype", "int8"), "int8"),
    ],
)
def test_wrong_calls(run: Run, arguments: tuple[str, ...], says: str) -> None:
    result = run("ask", *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (("nowhere.png", "What?"), b"", "picture 1 of 1: picture nowhere.png: there is no such file"),
        ((str(PICTURES[0]), str(GOLDEN), "What?"), b"", "picture 2 of 2"),
        (("-", "What?"), b"", "stdin: picture of 0 bytes: empty"),
        (("-", "What?"), b"no picture", "stdin: picture of 10 bytes: not a picture"),
        (("What?", "--temperature", "-1"), b"", "temperature"),
        (("What?", "--temperature", "nan"), b"", "temperature"),
        (("What?", "--top-p", "0"), b"", "top_p"),
        (("What?", "--max-new-tokens", "0"), b"", "max_new_tokens"),
        (("What?", "--stop", ""), b"", "stop"),
        (("What?", "--device", "abacus"), b"", "device"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, model: tuple[str, ...], arguments: tuple[str, ...], stdin: bytes, says: str
) -> None:
    result = run("ask", *model, *arguments, stdin=stdin)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_fewer_tiles_cost_fewer_tokens(run: Run) -> None:
    folder = ("--model", str(GOLDEN / "vl2-tiny-like"), "--device", "cpu", "--dtype", "float32")
    costs = []
    for option in ((), ("--max-tiles", "1")):
        result = run("ask", PICTURES[1], "What is it?", "--json", *SHORT, *option, *folder)
        assert result.exit_code == 0, result.output
        costs.append(json.loads(result.stdout)["usage"]["image_tokens"])
    assert costs == [157, 41]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_are_quantised_on_the_way_in(run: Run, model: tuple[str, ...], kind: str) -> None:
    result = run("ask", PICTURES[1], "What is it?", "--json", *SHORT, *model, "--quantize", kind)
    assert result.exit_code == 0, result.output
    assert result.stderr == "", "no live line where there is no terminal"
    other = seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="float32", quantize=kind)
    wanted = other.ask(PICTURES[1], "What is it?", max_new_tokens=6)
    assert json.loads(result.stdout)["token_ids"] == wanted.token_ids


def test_a_format_that_cannot_be_had_is_one_line(run: Run, tmp_path: Path) -> None:
    assert run("convert", GOLDEN / "vl1-siglip", tmp_path, "--quantize", "int8").exit_code == 0
    for arguments, code, says in (
        (("--model", tmp_path, "--quantize", "int4"), 1, "stored as int8"),
        (("--model", GOLDEN / "vl1-siglip", "--quantize", "int8", "--device", "cuda:99"), 1, "cuda:99"),
        (("--model", GOLDEN / "vl1-siglip", "--quantize", "fp8", "--device", "cpu"), 1, "a format of GPUs"),
        (("--quantize", "int3"), 2, "int3"),
    ):
        result = run("ask", "What?", *arguments)
        assert result.exit_code == code
        assert says in result.stderr
        assert result.stdout == ""
