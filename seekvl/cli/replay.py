"""`seekvl replay`: a request that a server logged, answered again."""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from seekvl.cli import options

EXAMPLE = "Example: seekvl replay chatcmpl-8f14e45f --log-prompts /var/log/seekvl"


def replay(
    name: Annotated[
        str, typer.Argument(metavar="ID", help="Id of the answer or prediction.", show_default=False)
    ],
    *,
    log_prompts: Annotated[
        Path,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder that seekvl serve --log-prompts wrote to.",
            show_default=False,
        ),
    ],
    json: options.Json = False,
) -> None:
    """Answer a logged request again, with its model, pictures, parameters and seed.

    Needs the extra `server`. The answers are printed; stderr tells whether they are what was answered then.
    The exit code is 1 when one is not.
    """
    from seekvl.runtime import require

    for module in ("fastapi", "httpcore2"):
        require(module, extra="server")
    with options.waiting_line(f"replaying {name}"):
        from seekvl.serve.request_log import replay as again

        answers = again(name, log_prompts)
    if json:
        told = [{**asdict(answer), "same": answer.same} for answer in answers]
        typer.echo(json_format.dumps({"id": name, "answers": told}))
    else:
        for answer in answers:
            typer.echo(answer.text)
            if answer.then is None:
                typer.echo("(it had not been answered then)", err=True)
            else:
                typer.echo("(the same as then)" if answer.same else f"(then: {answer.then})", err=True)
    if any(answer.then is not None and not answer.same for answer in answers):
        raise typer.Exit(1)
