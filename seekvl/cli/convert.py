"""`seekvl convert`: a checkpoint in another layout, dtype or in whole numbers."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from seekvl.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seekvl.weights.quantize import Matrix

EXAMPLE = (
    "Example: seekvl convert ~/models/deepseek-vl-1.3b-chat ~/models/deepseek-vl-1.3b-int4 --quantize int4"
)


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A bundled model (seekvl-nano, seekvl-nano-moe), a checkpoint folder, or a hub id.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(help="Folder to write, which appears whole.", file_okay=False, show_default=False),
    ],
    *,
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(
            help="Store the language model's matrices as whole numbers, for the CPU: half of the memory or "
            "less, and of the time a token takes.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        Literal["official", "transformers"] | None,
        typer.Option(
            help="Names and config files to write; those of the source by default.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Numbers to store what is not quantised in; those of the source by default.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a checkpoint that the folder already holds.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Write a checkpoint in another form.

    A quantised folder opens like any other, at once, and answers on the CPU. What of it is stored in which
    form, and how far that is off, is printed at the end.
    """
    if quantize is not None and layout == "transformers":
        raise typer.BadParameter("quantised checkpoints have the official layout", param_hint="--layout")
    with options.waiting_line(f"loading {source}"):
        from seekvl.runtime import DTYPES
        from seekvl.weights.config import read_config
        from seekvl.weights.load import find_folder, load_checkpoint
        from seekvl.weights.save import save_checkpoint
        from seekvl.weights.save_quantized import save_quantized

        stored = read_config(find_folder(source)).dtype
        wanted = DTYPES[dtype] if dtype is not None else stored
        checkpoint = load_checkpoint(source, device="cpu", dtype=wanted or "auto")
    config, tokenizer = checkpoint.config, checkpoint.folder / "tokenizer.json"
    matrices: Sequence[Matrix] = ()
    if quantize is None:
        with options.waiting_line(f"writing {target}"):
            save_checkpoint(
                checkpoint.model,
                target,
                config=config,
                tokenizer=tokenizer,
                layout=layout,
                overwrite=overwrite,
            )
    else:
        matrices = save_quantized(
            checkpoint.model,
            target,
            kind=quantize,
            config=config,
            tokenizer=tokenizer,
            overwrite=overwrite,
            progress=options.matrices_line(),
        )
    _report(target, matrices, json=json)


def _report(target: Path, matrices: "Sequence[Matrix]", *, json: bool) -> None:
    """Print what was written."""
    from dataclasses import asdict

    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    if json:
        entries = [asdict(matrix) for matrix in matrices]
        typer.echo(json_format.dumps({"folder": str(target), "bytes": size, "matrices": entries}))
        return
    typer.echo(f"{target}: {size:,} bytes of weights")
    for kind in ("int8", "int4"):
        errors = [matrix.error for matrix in matrices if matrix.kind == kind and matrix.error is not None]
        if errors:
            mean = sum(errors) / len(errors)
            typer.echo(
                f"{kind}: {len(errors)} matrices, off by {mean:.2%} of their norm, at most {max(errors):.2%}"
            )
    for matrix in matrices:
        if matrix.kind is None:
            typer.echo(f"as it was: {matrix.name}: {matrix.reason}")
