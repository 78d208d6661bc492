"""Whole requests, kept where an operator asked for it, and answered again, exactly.

A request is a file named by the id of its answer, a line of JSON each:

    {"model": ..., "conversation": ..., "params": [one for each choice], ...}
    {"choice": 0, "text": ..., "finish_reason": ...}        when it has been answered

Pictures are in it as they were decoded, so that an address that changed or a file that expired does no harm.
"""

import base64
import io
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
from anyio import CapacityLimiter
from PIL import Image

from seekvl.engine.request import Completion, SamplingParams
from seekvl.processing.conversation import Conversation, Message, Part, Picture, Text
from seekvl.processing.picture import open_picture
from seekvl.runtime import SeekVLError
from seekvl.serve.records import now
from seekvl.serve.service import load_model
from seekvl.serve.settings import Settings
from seekvl.vlm import VLM

MODEL_FIELDS = ("model", "device", "dtype", "quantize", "preprocessing", "max_tiles")
"""The settings that an answer depends on."""
PNG_MODES = frozenset(("1", "L", "LA", "P", "RGB", "RGBA"))
"""Modes of pictures that a PNG holds; others become RGB, as on their way to the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Logged:
    """A request as the engine got it."""

    conversation: Conversation
    params: tuple[SamplingParams, ...]
    """One for each choice, with their seeds."""
    max_tiles: int | None = None
    end_id: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """A choice, answered again."""

    text: str
    then: str | None
    """What it was when it was logged; None where it had not been answered."""

    @property
    def same(self) -> bool:
        """Whether both are the same."""
        return self.text == self.then


class RequestLog:
    """Writes requests into a folder that only its owner can read."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self._settings = folder, settings
        self._writer = CapacityLimiter(1)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def request(self, name: str, logged: Logged) -> None:
        """Write a request, before it is answered."""
        await anyio.to_thread.run_sync(partial(self._request, name, logged), limiter=self._writer)

    async def answer(self, name: str, completion: Completion, *, choice: int = 0) -> None:
        """Write an answer behind its request."""
        line = {"choice": choice, "text": completion.text, "finish_reason": completion.finish_reason}
        await anyio.to_thread.run_sync(partial(self._append, name, line), limiter=self._writer)

    def _request(self, name: str, logged: Logged) -> None:
        path = log_path(self.folder, name)
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        model = {field: getattr(self._settings, field) for field in MODEL_FIELDS}
        self._append(name, {"id": name, "at": now(), **model, **_written(logged)})

    def _append(self, name: str, line: Mapping[str, object]) -> None:
        with log_path(self.folder, name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def fresh_seed() -> int:
    """Draw a seed for a request that brings none, so that it can be replayed."""
    return secrets.randbits(62)


def log_path(folder: Path, name: str) -> Path:
    """Return the file of a request. Raises SeekVLError for a name that is no id."""
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
        raise SeekVLError(f"{name!r} is no id of a request")
    return folder / f"{name}.jsonl"


def replay(name: str, folder: Path, *, load: Callable[[Settings], VLM] = load_model) -> list[Replayed]:
    """Answer a logged request again, with the model it had. Raises SeekVLError where it was not logged."""
    try:
        first, *answers = log_path(folder, name).read_text(encoding="utf-8").splitlines()
        written = json.loads(first)
        logged = _read(written)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, SeekVLError):
            raise
        raise SeekVLError(f"no request {name} can be read in {folder}: was --log-prompts on?") from error
    then = {line["choice"]: line["text"] for line in map(json.loads, answers)}
    vlm = load(Settings(**{field: written[field] for field in MODEL_FIELDS}))
    replayed = []
    for choice, params in enumerate(logged.params):
        prepared = vlm.prepare(logged.conversation, params, max_tiles=logged.max_tiles)
        completion = vlm.engine.submit(replace(prepared, end_id=logged.end_id)).result()
        replayed.append(Replayed(text=completion.text, then=then.get(choice)))
    return replayed


def _written(logged: Logged) -> dict[str, object]:
    return {
        "system": logged.conversation.system,
        "conversation": [
            {
                "role": message.role,
                "control": message.control,
                "parts": [_written_part(part) for part in message.parts],
            }
            for message in logged.conversation.messages
        ],
        "params": [asdict(params) for params in logged.params],
        "max_tiles": logged.max_tiles,
        "end_id": logged.end_id,
    }


def _written_part(part: Part) -> dict[str, object]:
    if isinstance(part, Text):
        return {"text": part.text}
    image = part.source if isinstance(part.source, Image.Image) else open_picture(part.source)
    held = image if image.mode in PNG_MODES else image.convert("RGB")
    png = io.BytesIO()
    exif = image.info.get("exif")  # holds how the picture is turned
    held.save(png, format="PNG", **({} if exif is None else {"exif": exif}))
    return {"png": base64.b64encode(png.getvalue()).decode(), "detail": part.detail}


def _read(written: Mapping[str, Any]) -> Logged:
    turns = [
        Message(turn["role"], tuple(map(_read_part, turn["parts"])), control=turn["control"])
        for turn in written["conversation"]
    ]
    return Logged(
        conversation=Conversation(tuple(turns), written["system"]),
        params=tuple(SamplingParams(**params) for params in written["params"]),
        max_tiles=written["max_tiles"],
        end_id=written["end_id"],
    )


def _read_part(part: Mapping[str, Any]) -> Part:
    if "text" in part:
        return Text(part["text"])
    return Picture(base64.b64decode(part["png"]), detail=part["detail"])
