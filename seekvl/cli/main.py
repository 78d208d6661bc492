"""The command `seekvl`: its verbs, and how they end when something goes wrong.

Exit codes: 0 done, 1 failed, 2 called wrongly, 130 stopped by Ctrl-C.
"""

import errno
import io
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from seekvl import __version__
from seekvl.cli import ask, bench, chat, convert, eval, plan, replay, serve, train, verify


class Verbs(TyperGroup):
    """All verbs; what a user can cause ends in one line on stderr instead of a traceback."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # typer's own, older name
        """Run the verb that was called."""
        try:
            result: object = super().invoke(ctx)
        except KeyboardInterrupt:
            if ctx.params["debug"]:
                raise
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None
        except (OSError, ValueError) as error:
            line = _one_line(error)
            if line is None or ctx.params["debug"]:
                raise
            typer.echo(f"error: {line}", err=True)
            raise typer.Exit(1) from None
        return result


def _one_line(error: OSError | ValueError) -> str | None:
    """Return what to tell the user; None for what is a fault of ours, and for a closed pipe."""
    from seekvl.runtime import SeekVLError

    if isinstance(error, SeekVLError):
        return str(error)
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Example: seekvl ask picture.png "What is in the picture?"',
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seekvl {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """DeepSeek-VL: ask a model about pictures, check it, measure it, train it."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a letter must not end an answer


app.command("ask", epilog=ask.EXAMPLE)(ask.ask)
app.command("chat", epilog=chat.EXAMPLE)(chat.chat)
app.command("serve", epilog=serve.EXAMPLE)(serve.serve)
app.command("replay", epilog=replay.EXAMPLE)(replay.replay)
app.command("plan", epilog=plan.EXAMPLE)(plan.plan)
app.command("convert", epilog=convert.EXAMPLE)(convert.convert)
app.command("bench", epilog=bench.EXAMPLE)(bench.bench)
app.command("verify", epilog=verify.EXAMPLE)(verify.verify)
app.add_typer(eval.app, name="eval")
app.add_typer(train.app, name="train")
