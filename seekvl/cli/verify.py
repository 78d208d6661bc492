"""`seekvl verify`: whether this installation is right, and a checkpoint folder whole."""

import json as json_format
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seekvl.cli import options

if TYPE_CHECKING:
    from seekvl.weights.report import Report

EXAMPLE = "Example: seekvl verify ~/models/deepseek-vl-1.3b-chat"


def verify(
    folder: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder to look at, too.", show_default=False)
    ] = None,
    *,
    json: options.Json = False,
) -> None:
    """Compare this installation with the reference; with a folder, look at its files, too.

    The self-check asks two miniatures that ship with the package, of the 7B and of DeepSeek-VL2, and compares
    pixels, features, logits and ids with the reference's; then attention and router of tiny and base, and
    boxes; and it says what CPU kernels decode.

    Of a folder, files, keys, shapes, dtypes, numbers, tokenizer and template are checked.

    The exit code is 1 when anything failed.
    """
    with options.waiting_line("running the self-check"):
        from seekvl.engine.kernels.report import compare_with_torch
        from seekvl.weights.report import Checks
        from seekvl.weights.self_check import self_check

        report, checks = self_check(), Checks()
        checks.run("CPU kernels", lambda: (None, compare_with_torch()))  # that there are none is no failure
        reports = [replace(report, checks=(*report.checks, *checks.done))]
    if not json:
        _print(reports[0])
    if folder is not None:
        with options.waiting_line(f"looking at {folder}"):
            from seekvl.weights.verify import verify_folder

            reports.append(verify_folder(folder))
        if not json:
            _print(reports[1])
    ok = all(report.ok for report in reports)
    if json:
        shown = [{"ok": report.ok, **asdict(report)} for report in reports]
        typer.echo(json_format.dumps({"ok": ok, "reports": shown}))
    if not ok:
        failed = sum(not check.ok for report in reports for check in report.checks)
        typer.echo(f"error: {failed} check{'s' * (failed > 1)} failed", err=True)
        raise typer.Exit(1)


def _print(report: "Report") -> None:
    """Print a report as a title and a line for each check."""
    typer.echo(report.title)
    for line in report.lines():
        typer.echo(f"  {line}")
