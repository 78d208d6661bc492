"""A conversation at the prompt."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import seekvl
from seekvl.cli.chat import Talk
from seekvl.engine.request import SamplingParams
from tests.cli.conftest import GOLDEN, Run

PICTURE = GOLDEN / "images" / "text_320x200.png"
OTHER = GOLDEN / "images" / "exif6_120x80.png"
SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def vlm() -> seekvl.VLM:
    return seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="float32")


@pytest.fixture
def talk(vlm: seekvl.VLM) -> Talk:
    return Talk(vlm, params=SamplingParams(max_new_tokens=6), system=None)


def test_a_piped_conversation_equals_the_library(
    run: Run, model: tuple[str, ...], vlm: seekvl.VLM, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines = f"/image {OTHER}\nWhat is it?\n\n/image {PICTURE}\nAnd this?\n/save {saved}\n/exit\nnot heard\n"
    result = run("chat", *model, *SHORT, stdin=lines)
    assert result.exit_code == 0, result.output
    messages = json.loads(saved.read_text(encoding="utf-8"))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"][0] == {"type": "image", "image": str(OTHER.resolve())}
    answers = [messages[1]["content"][0]["text"], messages[3]["content"][0]["text"]]
    assert result.stdout == "".join(f"{answer.strip()}\n" for answer in answers)
    assert vlm.chat(messages[:1], max_new_tokens=6).text == answers[0]
    assert vlm.chat(messages[:3], max_new_tokens=6).text == answers[1]


def test_a_conversation_with_quantised_weights(run: Run, model: tuple[str, ...]) -> None:
    result = run("chat", *model, *SHORT, "--quantize", "int4", stdin="What is it?\nAnd now?\n")
    assert result.exit_code == 0, result.output
    session = seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="float32", quantize="int4").session()
    params = SamplingParams(max_new_tokens=6)
    answers = [session.ask(question, params=params).text for question in ("What is it?", "And now?")]
    assert result.stdout == "".join(f"{answer.strip()}\n" for answer in answers)


def test_the_past_stays_in_the_cache(talk: Talk) -> None:
    talk.hear(f"/image {PICTURE}")
    talk.hear("What is it?")
    first = talk._stream("And now?", [])
    assert first.usage.image_tokens == 36
    assert first.usage.cached_tokens > 140
    assert first.timings.vision == 0


def test_reset_forgets(talk: Talk) -> None:
    talk.hear("What is it?")
    talk.hear(f"/image {PICTURE}")
    talk.hear("/reset")
    assert (talk.turns, talk.session.messages, talk.waiting) == ((), (), [])
    assert talk._stream("And now?", []).usage.cached_tokens == 0


def test_load_takes_up_what_save_wrote(vlm: seekvl.VLM, talk: Talk, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    for line in (f"/image {OTHER}", "What is it?", f"/save {saved}"):
        assert talk.hear(line)
    other = Talk(vlm, params=SamplingParams(max_new_tokens=6), system="Be brief.")
    other.hear(f"/load {saved}")
    assert other.session.system is None
    assert other._stream("And now?", []).token_ids == talk._stream("And now?", []).token_ids
    other.hear(f"/save {tmp_path / 'again.json'}")
    talk.hear(f"/save {saved}")
    assert len(json.loads(saved.read_text(encoding="utf-8"))) == 2
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == saved.read_text(encoding="utf-8")


def test_what_is_no_utf_8_survives_load_and_save(talk: Talk, tmp_path: Path) -> None:
    """Names of files are bytes; those that are no UTF-8 are strings with lone surrogates."""
    odd = tmp_path / os.fsdecode(b"a\xff.png")
    odd.write_bytes(PICTURE.read_bytes())
    parts = [{"type": "image", "image": str(odd)}, {"type": "text", "text": "What? ☃"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A sign."}]
    saved, again = tmp_path / "talk.json", tmp_path / "again.json"
    saved.write_text(json.dumps(turns), encoding="utf-8")
    for line in (f"/load {saved}", f"/save {again}", f"/load {again}"):
        assert talk.hear(line)
    assert json.loads(again.read_text(encoding="utf-8"))[0]["content"] == parts
    assert len(talk.turns) == 2


def test_load_refuses_words_that_no_question_could_follow(
    talk: Talk, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]
    saved = tmp_path / "talk.json"
    saved.write_text(json.dumps(turns), encoding="utf-8")
    talk.hear(f"/load {saved}")
    assert "lone surrogate" in capsys.readouterr().err
    assert talk.turns == ()
    talk.hear(f"/save {tmp_path / 'again.json'}")
    assert "nothing was said" in capsys.readouterr().err


def test_save_keeps_detail_and_what_is_control(tmp_path: Path) -> None:
    tiled = seekvl.load(GOLDEN / "vl2-base-like", device="cpu", dtype="float32")
    talk = Talk(tiled, params=SamplingParams(max_new_tokens=6), system=None)
    name = str(PICTURE)
    near: list[dict[str, object]] = [{"type": "image", "image": name, "detail": "low"}]
    official = {"role": "<|User|>", "content": "<image><|ref|>it<|/ref|>.", "images": [name]}
    for asked in ({"role": "user", "content": [*near, {"type": "text", "text": "a"}]}, official):
        turns = [asked, {"role": "assistant", "content": "b"}]
        saved, again = tmp_path / "talk.json", tmp_path / "again.json"
        saved.write_text(json.dumps(turns), encoding="utf-8")
        for line in (f"/load {saved}", f"/save {again}"):
            assert talk.hear(line)
        wanted, found = (
            tiled.processor([*messages, {"role": "user", "content": "And?"}])
            for messages in (turns, json.loads(again.read_text(encoding="utf-8")))
        )
        assert found.prompt == wanted.prompt
        assert found.input_ids.tolist() == wanted.input_ids.tolist()


def test_home_is_known_to_every_command(talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(PICTURE.read_bytes())
    for line in ("/image ~/a.png", "What is it?", "/save ~/talk.json", "/load ~/talk.json"):
        assert talk.hear(line)
    (message, _) = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert message["content"][0] == {"type": "image", "image": str(tmp_path / "a.png")}


def test_boxes_are_in_pixels_of_the_last_picture(capsys: pytest.CaptureFixture[str]) -> None:
    tiled = seekvl.load(GOLDEN / "vl2-base-like", device="cpu", dtype="float32")
    params = SamplingParams(max_new_tokens=40, constrain="box_first")
    talk = Talk(tiled, params=params, system=None)
    for line, said in ((f"/image {PICTURE}", "(px)"), (f"/image {OTHER}", "(px of picture 2)")):
        talk.hear(line)
        talk.hear("Where is it?")
        assert said in capsys.readouterr().out


def test_system_prompt_is_saved(vlm: seekvl.VLM, tmp_path: Path) -> None:
    talk = Talk(vlm, params=SamplingParams(max_new_tokens=6), system="Be brief.")
    talk.hear("What is it?")
    talk.hear(f"/save {tmp_path / 'a.json'}")
    messages = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/image", "needs the path"),
        ("/image nowhere.png", "no such file"),
        ("/image ~no-such-user/a.png", "no such file"),
        ("/image a\0.png", "no file name holds a NUL"),
        ("/load ~no-such-user/a.json", "a.json"),
        (f"/image {GOLDEN}", "folder"),
        (f"/image {__file__}", "not a picture"),
        ("/save", "needs the name"),
        ("/save a.json", "nothing was said"),
        ("/load", "needs the name"),
        ("/load nowhere.json", "nowhere.json"),
        (f"/load {__file__}", "is no JSON"),
        ("/load long.json", "is no JSON"),
        (f"/load {PICTURE}", "is no JSON"),
        ("/dance", "no command"),
        ("word " * 5000, "more than the limit of 4,096"),
    ],
)
def test_errors_never_end_the_chat(
    talk: Talk,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: str,
) -> None:
    (tmp_path / "long.json").write_text("9" * 5000, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert talk.hear(line)
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert says in said.err
    assert said.err.count("\n") == 1
    assert talk.turns == ()


def test_save_into_no_folder_keeps_the_conversation(
    talk: Talk, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    talk.hear("What is it?")
    assert talk.hear(f"/save {tmp_path / 'no' / 'a.json'}")
    assert "does not exist" in capsys.readouterr().err
    assert len(talk.turns) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [("[]", "empty"), ('[{"role": "user", "content": "hi"}]', "ends with a question"), ("{}", "list")],
)
def test_load_refuses_what_is_no_conversation(
    talk: Talk, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, says: str
) -> None:
    talk.hear("What is it?")
    (tmp_path / "bad.json").write_text(content, encoding="utf-8")
    talk.hear(f"/load {tmp_path / 'bad.json'}")
    assert says in capsys.readouterr().err
    assert len(talk.turns) == 2


def test_a_failed_turn_keeps_its_pictures_and_drop_lets_them_go(talk: Talk) -> None:
    talk.hear(f"/image {PICTURE}")
    talk.hear("word " * 5000)
    assert len(talk.waiting) == 1
    talk.hear("/drop")
    assert talk.waiting == []


def test_help_lists_every_command(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.hear("/help")
    said = capsys.readouterr().out
    assert all(command in said for command in talk.commands)
    assert not talk.hear("/exit")


def test_end_of_input_ends_the_chat(run: Run, model: tuple[str, ...]) -> None:
    result = run("chat", *model, stdin="")
    assert (result.exit_code, result.stdout) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_cancels_the_answer_and_at_the_prompt_leaves(model: tuple[str, ...]) -> None:
    code = "from seekvl.cli.main import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "chat", "--max-new-tokens", "16000", *model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(f"/image {PICTURE}\nDescribe it.\n".encode())
    process.stdin.flush()
    assert process.stderr.readline() == b"picture 1 for the next message: 320x200 px\n"
    assert process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == b"cancelled: this turn is forgotten; 1 picture still waiting\n"
    process.stdin.write(b"/save a.json\n")
    process.stdin.flush()
    assert process.stderr.readline() == b"error: nothing was said yet: no file\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == b"interrupted"
