"""`seekvl chat`: a conversation at the prompt; its past stays in the cache."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from seekvl.cli import options
from seekvl.cli.show import Readable, box_lines, upright
from seekvl.processing.choices import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

    from seekvl.engine.request import Completion, SamplingParams
    from seekvl.processing.conversation import Conversation, Message
    from seekvl.vlm import VLM

EXAMPLE = "Example: seekvl chat, then /image picture.png, then a question; /help lists the rest"

HELP = """\
/image PATH  show a picture or URL with the next message; again for several
/drop        show none of the waiting pictures
/reset       forget the conversation
/save FILE   write the conversation as JSON, pictures by their path
/load FILE   go on with a conversation that was saved
/help        this list
/exit        leave; Ctrl-D does, too
Ctrl-C ends the running answer and its turn; pressed again, or at the prompt, it leaves."""


def chat(
    *,
    model: options.Model = options.NANO,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    preprocessing: options.Preprocessing = "seekvl",
    max_tiles: options.MaxTiles = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
) -> None:
    """Talk about pictures, turn by turn; each line of stdin is a message or a command such as /help."""
    from seekvl.engine.request import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop) if stop else None,
    )
    vlm = options.load_vlm(
        model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        preprocessing=preprocessing,
        max_tiles=max_tiles,
    )
    talk = Talk(vlm, params=params, system=system)
    for line in _lines():
        if not talk.hear(line):
            return


def _lines() -> Iterator[str]:
    """Yield what is typed, or what a pipe brings, until it ends."""
    live = sys.stdin.isatty() and sys.stdout.isatty()
    if live:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() history and editing
        typer.echo("/help lists the commands, /exit leaves")
    while True:
        try:
            yield input("> " if live else "")
        except EOFError:
            if live:
                typer.echo()
            return


class Talk:
    """One conversation: the session that answers, and its turns with the names of their pictures."""

    def __init__(self, vlm: "VLM", *, params: "SamplingParams", system: str | None) -> None:
        self.vlm = vlm
        self.params = params
        self.session = vlm.session(system=system)
        self.turns: tuple[Message, ...] = ()
        """As in the session, but with the path of a picture instead of its pixels."""
        self.waiting: list[tuple[str, Image.Image]] = []
        """Pictures for the next message, with their names."""
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.image,
            "/drop": self.drop,
            "/reset": self.reset,
            "/save": self.save,
            "/load": self.load,
            "/help": self.help,
        }

    def hear(self, line: str) -> bool:
        """Do what a line asks for; False when it asks to leave. Errors are told and change nothing."""
        from seekvl.runtime import SeekVLError

        words = line.strip()
        name, _, argument = words.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        try:
            if not words:
                return True
            if not name.startswith("/"):
                self.answer(words)
            elif name in self.commands:
                self.commands[name](argument.strip())
            else:
                raise SeekVLError(f"{name} is no command: /help lists them")
        except (SeekVLError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
        return True

    def answer(self, question: str) -> None:
        """Answer a question about the waiting pictures and what was said before."""
        from seekvl.processing.conversation import Message, Text
        from seekvl.vlm import user_message

        names, pictures = [name for name, _ in self.waiting], [picture for _, picture in self.waiting]
        completion = self._stream(question, pictures)
        if completion.finish_reason == "cancelled":
            typer.echo("cancelled: this turn is forgotten" + self._still_waiting(), err=True)
        elif not completion.text.strip():
            typer.echo("the answer is empty: this turn is forgotten" + self._still_waiting(), err=True)
        else:
            said = Message("assistant", (Text(completion.text),))
            self.turns += (user_message(question, names), said)
            self.waiting = []

    def _stream(self, question: str, pictures: list["Image.Image"]) -> "Completion":
        """Show the answer as it comes, and its boxes below."""
        from seekvl.vlm import answer_of

        seen = [*(picture for turn in self.session.messages for picture in _pixels(turn)), *pictures]
        readable, completion = Readable(), None
        with _first_interrupt() as interrupted:
            pieces = self.session.stream(question, images=pictures, params=self.params, cancel=interrupted)
            for piece in options.awaited(pieces):
                completion = piece.completion
                typer.echo(readable.push(piece.text), nl=False)
        typer.echo(readable.finish())
        assert completion is not None
        for line in box_lines(answer_of(completion).boxes, [picture.size for picture in seen]):
            typer.echo(line)
        return completion

    def _still_waiting(self) -> str:
        """Say how many pictures still wait."""
        count = len(self.waiting)
        return f"; {count} picture{'s' * (count > 1)} still waiting" if count else ""

    def image(self, name: str) -> None:
        """Open a picture for the next message."""
        from seekvl.processing.picture import open_picture
        from seekvl.runtime import SeekVLError

        if not name:
            raise SeekVLError("/image needs the path of a picture")
        local = "://" not in name and not name.startswith("data:")
        source = _path(name) if local else name
        mode = self.vlm.processor.preprocessing
        picture = upright(open_picture(source, mode=mode), preprocessing=mode)
        self.waiting.append((str(source.resolve()) if isinstance(source, Path) else source, picture))
        typer.echo(
            f"picture {len(self.waiting)} for the next message: {picture.width}x{picture.height} px", err=True
        )

    def drop(self, argument: str = "") -> None:
        """Let go of the waiting pictures."""
        self.waiting = []

    def reset(self, argument: str = "") -> None:
        """Forget the conversation and the waiting pictures."""
        self.session.reset()
        self.turns, self.waiting = (), []
        typer.echo("the conversation is forgotten", err=True)

    def save(self, name: str) -> None:
        """Write the conversation as JSON that `VLM.chat` and /load take."""
        from seekvl.runtime import SeekVLError, atomic_file

        if not name or not self.turns:
            raise SeekVLError(
                "/save needs the name of a file" if not name else "nothing was said yet: no file"
            )
        messages = [_as_json(message) for message in self.turns]
        if self.session.system is not None:
            messages.insert(0, {"role": "system", "content": self.session.system})
        text = json.dumps(messages, ensure_ascii=False, indent=1) + "\n"
        with atomic_file(_path(name)) as part:
            part.write_text(text, encoding="utf-8", errors="backslashreplace")  # no UTF-8: an escape of JSON
        typer.echo(f"saved {len(self.turns)} messages in {name}", err=True)

    def load(self, name: str) -> None:
        """Take up a conversation that was saved."""
        conversation = _read(name)
        mode = self.vlm.processor.preprocessing
        opened = tuple(_with_pixels(message, preprocessing=mode) for message in conversation.messages)
        self.vlm.processor.tokens(replace(conversation, messages=opened))  # raises for what cannot be encoded
        self.session.reset()
        self.session.system, self.session.messages = conversation.system, opened
        self.turns, self.waiting = conversation.messages, []
        typer.echo(f"took up {len(opened)} messages of {name}", err=True)

    def help(self, argument: str = "") -> None:
        """Print the commands."""
        typer.echo(HELP)


def _read(name: str) -> "Conversation":
    """Read a saved conversation, which must end with an answer."""
    from seekvl.processing.conversation import parse_messages
    from seekvl.runtime import SeekVLError

    if not name:
        raise SeekVLError("/load needs the name of a file")
    try:
        messages = json.loads(_path(name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SeekVLError(f"{name} is no JSON: {error}") from error
    conversation = parse_messages(messages)
    if conversation.messages[-1].role != "assistant":
        raise SeekVLError(f"{name} ends with a question; a saved conversation ends with an answer")
    return conversation


def _path(name: str) -> Path:
    """Return the path that was typed; ~ is a home folder, and itself where there is no such user."""
    from seekvl.runtime import SeekVLError

    if "\0" in name:
        raise SeekVLError(f"{name!r} is no path: no file name holds a NUL")
    return Path(os.path.expanduser(name))


def _as_json(message: "Message") -> dict[str, object]:
    """Write a message as content parts, or in the official form where its specials act as such."""
    from seekvl.processing.conversation import PLACEHOLDER, Text

    if message.control:
        words = [part.text if isinstance(part, Text) else PLACEHOLDER for part in message.parts]
        images = [str(picture.source) for picture in message.pictures]
        return {"role": message.role.capitalize(), "content": "".join(words), "images": images}
    parts: list[dict[str, str]] = []
    for part in message.parts:
        if isinstance(part, Text):
            parts.append({"type": "text", "text": part.text})
        else:
            detail = {} if part.detail == "auto" else {"detail": part.detail}
            parts.append({"type": "image", "image": str(part.source), **detail})
    return {"role": message.role, "content": parts}


def _pixels(message: "Message") -> list["Image.Image"]:
    """Return the opened pictures of a message."""
    from PIL import Image

    sources = [picture.source for picture in message.pictures]
    return [source for source in sources if isinstance(source, Image.Image)]


def _with_pixels(message: "Message", *, preprocessing: Preprocessing) -> "Message":
    """Open the pictures of a message, as the session keeps them."""
    from seekvl.processing.conversation import Picture
    from seekvl.processing.picture import open_picture

    parts = tuple(
        replace(
            part, source=upright(open_picture(part.source, mode=preprocessing), preprocessing=preprocessing)
        )
        if isinstance(part, Picture)
        else part
        for part in message.parts
    )
    return replace(message, parts=parts)


@contextlib.contextmanager
def _first_interrupt() -> Iterator[Callable[[], bool]]:
    """Only note the first Ctrl-C, so that no step is broken off; yield what tells. A second interrupts."""
    noted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        """Take a Ctrl-C."""
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return
    former = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, former)
