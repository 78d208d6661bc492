"""Measuring, from the command line."""

import json
from pathlib import Path

import pytest

from seekvl.corpus.nano import KINDS
from tests.cli.conftest import Run


def test_table_and_file(run: Run, model: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "accuracy.json"
    result = run("eval", "nano", "--n", "2", "--kinds", "exist,read", "--kinds", "read", "--out", out, *model)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("| question | n |")
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| exist", "2"], ["| read", "2"]]
    assert "4/4 questions" in result.stderr
    assert json.loads(out.read_text(encoding="utf-8"))["kinds"]["read"]["n"] == 2


def test_json_names_seed_and_kinds(run: Run, model: tuple[str, ...]) -> None:
    result = run("eval", "nano", "--n", "1", "--kinds", "locate", "--seed", "7", "--json", *model)
    said = json.loads(result.stdout)
    assert (said["seed"], list(said["kinds"])) == (7, ["locate"])


def test_small_print_is_measured_where_it_is_asked_for(run: Run, model: tuple[str, ...]) -> None:
    result = run("eval", "nano", "--n", "1", "--kinds", "small_print,small_locate", "--json", *model)
    assert result.exit_code == 0, result.output
    kinds = json.loads(result.stdout)["kinds"]
    assert {kind: row["n"] for kind, row in kinds.items()} == {"small_print": 1, "small_locate": 1}


def test_all_kinds_but_small_print_are_measured_by_default(run: Run, model: tuple[str, ...]) -> None:
    kinds = json.loads(run("eval", "nano", "--n", "1", "--json", *model).stdout)["kinds"]
    assert list(kinds) == list(KINDS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--kinds", "smell"), "smell"),
        (("--n", "0"), "--n"),
        (("--out", "nowhere/a.json"), "nowhere"),
    ],
)
def test_wrong_calls(run: Run, arguments: tuple[str, ...], says: str) -> None:
    result = run("eval", "nano", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
