"""A file of questions: every answer the library's own, resumed after any stop."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import seekvl
from seekvl.engine.request import SamplingParams
from seekvl.recipes.answer_file import Line, Tally, answer_file, failures_of, read_done, read_question
from seekvl.runtime import SeekVLError
from seekvl.vlm import Answer

EXAMPLES = Path(__file__).parents[2] / "examples"
PARAMS = SamplingParams(max_new_tokens=12)
QUESTIONS = [
    {"id": "sign", "images": [str(EXAMPLES / "sign.png")], "question": "What does the sign say?"},
    {"id": "chart", "images": [str(EXAMPLES / "chart.png")], "question": "Which bar is tallest?"},
    {"id": "words", "question": "Hello."},
    {
        "id": "messages",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": str(EXAMPLES / "sign.png")},
                    {"type": "text", "text": "Where is the sign?"},
                ],
            }
        ],
    },
]


@pytest.fixture(scope="module")
def vlm() -> seekvl.VLM:
    return seekvl.load(device="cpu", dtype="float32")


def line(name: str, answer: Answer, sizes: Sequence[tuple[int, int]]) -> str:
    return json.dumps({"id": name, "text": answer.text, "sizes": sizes})


def written(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def answers(path: Path) -> dict[str, str]:
    return {row["id"]: row["text"] for row in map(json.loads, path.read_text().splitlines())}


def run(vlm: seekvl.VLM, source: Path, out: Path, **options: object) -> Tally:
    return answer_file(vlm, source, out, params=PARAMS, write=line, **options)  # type: ignore[arg-type]


def test_every_answer_is_the_librarys(vlm: seekvl.VLM, tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    told: list[int] = []
    tally = run(vlm, source, out, progress=lambda now: told.append(now.answered))
    assert (tally.total, tally.answered, tally.kept, tally.failed) == (4, 4, 0, 0)
    assert told == [1, 2, 3, 4]
    found = answers(out)
    sign, chart = EXAMPLES / "sign.png", EXAMPLES / "chart.png"
    for name, pictures, question in (
        ("sign", [sign], "What does the sign say?"),
        ("chart", [chart], "Which bar is tallest?"),
        ("words", [], "Hello."),
        ("messages", [sign], "Where is the sign?"),
    ):
        assert found[name] == vlm.ask(pictures, question, max_new_tokens=12).text
    assert failures_of(out).read_text() == ""
    assert json.loads(out.read_text().splitlines()[0])["sizes"] is not None


def test_a_run_goes_on_where_it_was(vlm: seekvl.VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = written(tmp_path / "in.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    out.write_text('{"id": "sign", "text": "kept"}\n{"id": "chart", "te')  # the second was cut by a stop
    asked: list[object] = []
    prepare = vlm.prepare
    monkeypatch.setattr(vlm, "prepare", lambda given, params: asked.append(given) or prepare(given, params))
    tally = run(vlm, source, out)
    assert (tally.kept, tally.answered) == (1, 3)
    assert len(asked) == 3
    assert answers(out)["sign"] == "kept"
    assert len(answers(out)) == 4
    before = out.read_text()
    assert run(vlm, source, out).kept == 4
    assert out.read_text() == before


def test_more_questions_than_fit_into_the_engine(vlm: seekvl.VLM, tmp_path: Path) -> None:
    rows = [{"id": str(number), "question": f"Hello {number}."} for number in range(40)]
    out = tmp_path / "out.jsonl"
    assert run(vlm, written(tmp_path / "in.jsonl", rows), out).answered == 40
    assert answers(out).keys() == {str(number) for number in range(40)}


def test_what_fails_is_taken_down_and_tried_again(vlm: seekvl.VLM, tmp_path: Path) -> None:
    picture = tmp_path / "late.png"
    rows = [
        QUESTIONS[2],
        "{",
        [],
        {"question": "Who?"},
        {"id": "both", "question": "x", "messages": []},
        {"id": "extra", "question": "x", "temperature": 1},
        {"id": "late", "images": [str(picture)], "question": "What is it?"},
        {"id": "long", "question": "a " * 5000},
        {"id": "words", "question": "Twice."},
        {"id": "last", "question": "Bye."},
    ]
    source, out = written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    tally = run(vlm, source, out)
    assert (tally.answered, tally.failed) == (2, 8)
    assert answers(out).keys() == {"words", "last"}
    failed = [json.loads(row) for row in failures_of(out).read_text().splitlines()]
    assert [row["line"] for row in failed] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert [row["id"] for row in failed][-3:] == ["late", "long", "words"]
    assert "line 1, too" in failed[-1]["error"]
    shutil.copy(EXAMPLES / "sign.png", picture)
    again = run(vlm, source, out)
    assert (again.kept, again.answered, again.failed) == (2, 1, 7)
    assert "late" in answers(out)


def test_a_folder_of_pictures(vlm: seekvl.VLM, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(EXAMPLES / "sign.png", tmp_path / "in" / "sign.PNG")
    shutil.copy(EXAMPLES / "chart.png", tmp_path / "in" / "deep" / "chart.png")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    out = tmp_path / "out.jsonl"
    run(vlm, tmp_path / "in", out, question="What does the sign say?")
    assert answers(out).keys() == {"sign.PNG", str(Path("deep") / "chart.png")}
    assert answers(out)["sign.PNG"] == "WALL"


def test_a_system_prompt_is_for_those_without(tmp_path: Path) -> None:
    own = {"id": "a", "messages": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]}
    assert read_question(Line(1, json.dumps(own)), system="All.").conversation.system == "Mine."
    assert (
        read_question(Line(1, '{"id": "a", "question": "Hi"}'), system="All.").conversation.system == "All."
    )


def test_a_wrong_source_or_target_is_told(vlm: seekvl.VLM, tmp_path: Path) -> None:
    empty, out = written(tmp_path / "in.jsonl", [""]), tmp_path / "out.jsonl"
    with pytest.raises(SeekVLError, match="holds no question"):
        run(vlm, empty, out)
    with pytest.raises(SeekVLError, match="say what is asked"):
        run(vlm, tmp_path, out)
    with pytest.raises(SeekVLError, match="leave the one behind it out"):
        run(vlm, written(tmp_path / "in.jsonl", QUESTIONS), out, question="What?")
    (tmp_path / "notes").write_text("dear diary\n")
    with pytest.raises(SeekVLError, match="line 1 is no answer"):
        read_done(tmp_path / "notes")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\n")
    with pytest.raises(SeekVLError, match="no UTF-8"):
        run(vlm, tmp_path / "bytes", out)
