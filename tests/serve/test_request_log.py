"""Whole requests, kept where an operator asked for it, and answered again."""

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from typer.testing import CliRunner

import seekvl
from seekvl.cli.main import app
from seekvl.engine.request import SamplingParams
from seekvl.processing.conversation import Conversation, Message, Picture, Text
from seekvl.processing.pad_image import to_rgb, upright
from seekvl.processing.picture import open_picture
from seekvl.runtime import SeekVLError
from seekvl.serve.request_log import Logged, RequestLog, _read, log_path, replay
from seekvl.serve.settings import Settings
from tests.serve.conftest import Running, Start
from tests.serve.predicting import FULL, SIGN, SIMPLE, client_of, full, simple

QUESTION = "Describe the picture."


@pytest.fixture
def logging(start: Start, tmp_path: Path) -> tuple[Running, Path]:
    """A server that keeps requests, and where."""
    folder = tmp_path / "log"
    return start(log_prompts=folder), folder


def test_a_prediction_is_answered_again_exactly(logging: tuple[Running, Path]) -> None:
    server, folder = logging
    for model, given in (
        (FULL, full(QUESTION, temperature=1.5, image2=SIGN)),  # drawn at random, with no seed
        (SIMPLE, simple(QUESTION, temperature=1, stop=["sign"], max_length_tokens=7)),
    ):
        found = client_of(server).predictions.create(version=model, input=given, wait=True)
        (again,) = replay(found.id, folder)
        text = found.output if model == SIMPLE else found.output["text_out"]
        assert again.text == again.then == text
        assert again.same


def test_a_chat_is_answered_again_exactly(logging: tuple[Running, Path]) -> None:
    server, folder = logging
    client = openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)
    picture = "data:image/png;base64," + base64.b64encode(SIGN.read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": picture, "detail": "low"}},
        {"type": "text", "text": QUESTION},
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    asked: dict[str, Any] = {"model": FULL, "messages": messages, "temperature": 1.5}
    found = client.chat.completions.create(**asked, n=3, extra_body={"ignore_eos": True}, max_tokens=8)
    texts = [choice.message.content for choice in found.choices]
    again = replay(found.id, folder)
    assert [each.text for each in again] == [each.then for each in again] == texts
    chunks = list(client.chat.completions.create(**asked, stream=True))
    (streamed,) = replay(chunks[0].id, folder)
    assert streamed.same
    assert streamed.text == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_answered_again_by_its_own_id(logging: tuple[Running, Path], stream: bool) -> None:
    server, folder = logging
    client = openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)
    picture = "data:image/png;base64," + base64.b64encode(SIGN.read_bytes()).decode()
    parts = [{"type": "input_image", "image_url": picture}, {"type": "input_text", "text": QUESTION}]
    asked: Any = {"model": FULL, "input": [{"role": "user", "content": parts}], "temperature": 1.5}
    if stream:
        *_, last = client.responses.create(**asked, instructions="Be brief.", stream=True)
        found = last.response
    else:
        found = client.responses.create(**asked, instructions="Be brief.")
    assert found.id.startswith("resp_")
    assert [path.stem for path in folder.iterdir()] == [found.id]
    (again,) = replay(found.id, folder)
    assert again.text == again.then == found.output_text
    done = CliRunner().invoke(app, ["replay", found.id, "--log-prompts", str(folder)])
    assert (done.exit_code, done.stdout) == (0, f"{found.output_text}\n")


def test_nothing_is_kept_unless_it_was_asked_for(server: Running, tmp_path: Path) -> None:
    assert server.settings.log_prompts is None
    assert server.server.config.app.state.desk.log is None


def test_only_its_owner_reads_it(logging: tuple[Running, Path]) -> None:
    server, folder = logging
    found = client_of(server).predictions.create(version=SIMPLE, input=simple(), wait=True)
    assert folder.stat().st_mode & 0o077 == 0
    assert log_path(folder, found.id).stat().st_mode & 0o077 == 0


def test_the_verb(logging: tuple[Running, Path]) -> None:
    server, folder = logging
    name = client_of(server).predictions.create(version=SIMPLE, input=simple(), wait=True).id
    run = CliRunner()
    done = run.invoke(app, ["replay", name, "--log-prompts", str(folder)])
    assert (done.exit_code, done.stdout) == (0, "WALL\n")
    assert "the same as then" in done.stderr
    done = run.invoke(app, ["replay", name, "--log-prompts", str(folder), "--json"])
    assert json.loads(done.stdout)["answers"] == [{"text": "WALL", "then": "WALL", "same": True}]
    path = log_path(folder, name)
    path.write_text(path.read_text().replace('"text": "WALL"', '"text": "DOOR"'))
    done = run.invoke(app, ["replay", name, "--log-prompts", str(folder)])
    assert (done.exit_code, done.stdout) == (1, "WALL\n")
    assert "then: DOOR" in done.stderr
    path.write_text(path.read_text().partition("\n")[0] + "\n")  # it was never answered
    done = run.invoke(app, ["replay", name, "--log-prompts", str(folder)])
    assert done.exit_code == 0
    assert "not been answered" in done.stderr


@pytest.mark.parametrize("name", ["missing", "../x", "", "a/b", ".."])
def test_what_was_not_logged(tmp_path: Path, name: str) -> None:
    with pytest.raises(SeekVLError):
        replay(name, tmp_path)
    done = CliRunner().invoke(app, ["replay", name, "--log-prompts", str(tmp_path)])
    assert done.exit_code == 1


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"conversation": []}'])
def test_a_log_that_is_broken(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(SeekVLError, match="was --log-prompts on"):
        replay("x", tmp_path)


def turned(mode: str) -> Image.Image:
    """A small picture of a mode, that lies on its side."""
    with Image.open(SIGN) as sign:
        picture = sign.convert("RGB").resize((40, 30)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.info["exif"] = exif.tobytes()
    return picture


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_are_kept_to_the_pixel(tmp_path: Path, mode: str) -> None:
    picture = turned(mode)
    if mode == "P":
        picture.info["transparency"] = 3
    conversation = Conversation((Message("user", (Text("a"), Picture(picture, detail="low"))),), "s")
    params = SamplingParams(seed=3, stop=("x",), constrain=None, top_k=4)
    logged = Logged(conversation=conversation, params=(params,), max_tiles=2, end_id=-1)
    log = RequestLog(tmp_path, Settings())
    asyncio.run(log.request("x", logged))
    again = _read(json.loads(log_path(tmp_path, "x").read_text()))
    (kept,) = again.conversation.pictures
    assert kept.detail == "low"
    assert isinstance(kept.source, bytes)
    read = open_picture(kept.source)
    colours = [to_rgb(upright(each), backdrop=(1, 2, 3), mode="seekvl") for each in (picture, read)]
    assert colours[0].size == colours[1].size == (30, 40)
    assert colours[0].tobytes() == colours[1].tobytes()
    assert (again.max_tiles, again.end_id, again.conversation.system) == (2, -1, "s")
    assert again.params[0].stops == ("x",)
    assert (again.params[0].seed, again.params[0].top_k) == (3, 4)


def test_a_logged_request_holds_no_address(logging: tuple[Running, Path], vlm: seekvl.VLM) -> None:
    server, folder = logging
    file = client_of(server).files.create(SIGN)
    given = full(QUESTION, image1=file.urls["get"])
    found = client_of(server).predictions.create(version=FULL, input=given, wait=True)
    client_of(server).files.delete(file.id)
    (again,) = replay(found.id, folder)
    assert again.same
    part = json.loads(log_path(folder, found.id).read_text().splitlines()[0])["conversation"][0]["parts"][1]
    with Image.open(io.BytesIO(base64.b64decode(part["png"]))) as kept, Image.open(SIGN) as picture:
        assert kept.tobytes() == picture.tobytes()
