"""Answering a file of questions: many at once through the engine, a line of JSON each, gone on with at will.

    in.jsonl   {"id": "a", "images": ["a.png"], "question": "What is it?"}     or a folder of pictures
               {"id": "b", "messages": [{"role": "user", "content": ...}]}     and one question for all
    out.jsonl  {"id": "a", "text": ...}                                        as answers come to their end
    out.jsonl.failed  {"line": 2, "id": "b", "error": ...}                     of the last run

What stands in out.jsonl is not asked again, so a run that was stopped goes on where it was; what failed is
tried again. Paths of pictures are those of the current directory.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from seekvl.engine.handle import Handle
from seekvl.engine.request import Request, SamplingParams
from seekvl.processing.conversation import Conversation, parse_messages
from seekvl.runtime import SeekVLError
from seekvl.vlm import VLM, Answer, answer_of, user_message

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"))
"""Names of pictures in a folder."""
IN_FLIGHT = 2
"""Times the rows of an engine: how many questions are prepared before others have ended."""

Size = tuple[int, int]
"""Width and height of a picture in px."""
Write = Callable[[str, Answer, Sequence[Size]], str]
"""Writes a question's id, its answer and the sizes of its pictures as one line of JSON."""


@dataclass(frozen=True, slots=True)
class Line:
    """A question as it stands in the file, not yet read."""

    number: int
    """From 1 on; of a folder, the number of the picture."""
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """One that can be asked."""

    id: str
    conversation: Conversation


@dataclass(slots=True)
class Tally:
    """How far a run is."""

    total: int
    kept: int = 0
    """Questions whose answers were there already."""
    answered: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A question whose answer grows."""

    line: Line
    id: str
    request: Request
    handle: Handle


@dataclass(kw_only=True, slots=True)
class _Run:
    """What lives while a file is answered."""

    vlm: VLM
    params: SamplingParams
    system: str | None
    write: Write
    progress: Callable[[Tally], None]
    tally: Tally
    done: set[str]
    """Ids that have their answer."""
    answers: TextIO
    failures: TextIO
    lines: dict[str, int] = field(default_factory=dict)
    """Number of the line of each id."""
    left: list[_UnderWay] = field(default_factory=list)

    def take_in(self, line: Line) -> None:
        """Hand a question to the engine, unless it has its answer."""
        name = None
        try:
            asked = read_question(line, system=self.system)
            name = asked.id
            first = self.lines.setdefault(name, line.number)
            if first != line.number:
                raise SeekVLError(f"the id {name!r} is that of line {first}, too")
            if name in self.done:
                self.tally.kept += 1
                return
            request = self.vlm.prepare(asked.conversation, self.params)
            self.left.append(_UnderWay(line, name, request, self.vlm.engine.submit(request)))
        except SeekVLError as error:
            self.fail(line, name, error)

    def collect(self) -> None:
        """Make a step, and write the answers that came to their end."""
        self.vlm.engine.step()
        for one in list(self.left):
            try:
                answer = _answer(one.handle)
            except SeekVLError as error:
                self.left.remove(one)
                self.fail(one.line, one.id, error)
                continue
            if answer is not None:
                self.left.remove(one)
                _put(self.answers, self.write(one.id, answer, one.request.inputs.picture_sizes))
                self.tally.answered += 1
                self.progress(self.tally)

    def fail(self, line: Line, name: str | None, error: Exception) -> None:
        """Take down that a question cannot be answered."""
        _put(self.failures, json.dumps({"line": line.number, "id": name, "error": str(error)}))
        self.tally.failed += 1
        self.progress(self.tally)


def answer_file(
    vlm: VLM,
    source: Path,
    out: Path,
    *,
    params: SamplingParams,
    write: Write,
    question: str | None = None,
    system: str | None = None,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Answer every question of `source` that has no answer in `out` yet; return what came of them.

    question: asked about every picture where `source` is a folder. system: system prompt of questions that
    bring none. progress: is told whenever a question is done with.

    A question that cannot be answered is taken down and holds no other up. Raises SeekVLError for a source
    that holds none, and for an `out` that something else has written.
    """
    lines, done = read_lines(source, question=question), read_done(out)
    coming, most = iter(lines), IN_FLIGHT * vlm.engine.limits.rows
    with out.open("a", encoding="utf-8") as answers, failures_of(out).open("w", encoding="utf-8") as failures:
        run = _Run(
            vlm=vlm,
            params=params,
            system=system,
            write=write,
            progress=progress,
            tally=Tally(total=len(lines)),
            done=done,
            answers=answers,
            failures=failures,
        )
        while True:
            while len(run.left) < most and (line := next(coming, None)) is not None:
                run.take_in(line)
            if not run.left:
                return run.tally
            run.collect()


def read_lines(source: Path, *, question: str | None) -> list[Line]:
    """Return the questions of a file or folder as they stand there. Raises SeekVLError where is none."""
    if source.is_dir():
        if question is None:
            raise SeekVLError(f"{source} is a folder of pictures: say what is asked about each of them")
        names = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        texts = [
            json.dumps({"id": str(path.relative_to(source)), "images": [str(path)], "question": question})
            for path in names
        ]
    elif question is not None:
        raise SeekVLError(f"the questions stand in {source}: leave the one behind it out")
    else:
        texts = _text(source).split("\n")  # not splitlines, which cuts at letters that JSON may hold
    lines = [Line(number, text) for number, text in enumerate(texts, start=1) if text.strip()]
    if not lines:
        raise SeekVLError(f"{source} holds no question")
    return lines


def read_question(line: Line, *, system: str | None = None) -> Question:
    """Read one question. Raises SeekVLError for what is none.

    >>> read_question(Line(1, '{"id": "a", "question": "Hello."}')).id
    'a'
    """
    try:
        row = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise SeekVLError(f"no JSON: {error}") from error
    if not isinstance(row, Mapping) or not isinstance(row.get("id"), str) or not row["id"]:
        raise SeekVLError('a question is {"id": "...", "images": [...], "question": "..."}; this has no id')
    unknown = row.keys() - {"id", "images", "question", "messages"}
    if unknown or ("messages" in row) == ("question" in row) or {"messages", "images"} <= row.keys():
        raise SeekVLError(f"a question has id and messages, or id, images and question; not {sorted(row)}")
    if "messages" in row:
        conversation = parse_messages(row["messages"])
    else:
        conversation = Conversation((user_message(row["question"], row.get("images", [])),))
    if conversation.system is None and system is not None:
        conversation = Conversation(conversation.messages, system)
    return Question(row["id"], conversation)


def read_done(out: Path) -> set[str]:
    """Return the ids that have their answer, and take away a last line that was not written to its end.

    Raises SeekVLError for lines that are no answers.
    """
    if not out.exists():
        return set()
    text = _text(out)
    whole = text[: text.rfind("\n") + 1]
    done = set()
    for number, line in enumerate(whole.split("\n")[:-1], start=1):
        try:
            done.add(str(json.loads(line)["id"]))
        except (ValueError, LookupError, TypeError) as error:
            raise SeekVLError(f"{out}, line {number} is no answer: write to another file") from error
    if whole != text:
        out.write_text(whole, encoding="utf-8")
    return done


def failures_of(out: Path) -> Path:
    """Return where the failures of a run are written.

    >>> failures_of(Path("out.jsonl")).name
    'out.jsonl.failed'
    """
    return out.with_name(f"{out.name}.failed")


def _answer(handle: Handle) -> Answer | None:
    """Return an answer that has come to its end; None while it grows."""
    while (piece := handle.poll()) is not None:
        if piece.completion is not None:
            return answer_of(piece.completion)
    return None


def _put(file: TextIO, line: str) -> None:
    """Write a line so that it is there whatever happens next."""
    file.write(line + "\n")
    file.flush()


def _text(path: Path) -> str:
    """Read a file. Raises SeekVLError for one that is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SeekVLError(f"{path} is no UTF-8 text") from error
