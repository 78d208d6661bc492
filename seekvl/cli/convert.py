"""`seekvl convert`: a checkpoint in another layout, dtype or in whole numbers."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from seekvl.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from seekvl.weights.load import Checkpoint
    from seekvl.weights.quantize import Matrix, Part

EXAMPLE = (
    "Example: seekvl convert ~/models/deepseek-vl-1.3b-chat ~/models/deepseek-vl-1.3b-int4 --quantize int4"
)

Source = Annotated[
    str,
    typer.Argument(
        help="A bundled model (seekvl-nano, seekvl-nano-moe), a checkpoint folder, or a hub id.",
        show_default=False,
    ),
]
Target = Annotated[
    Path,
    typer.Argument(help="Folder to write, which appears whole.", file_okay=False, show_default=False),
]
Quantize = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(
        help="Store the language model's matrices as whole numbers, for the CPU: half of the memory or "
        "less, and of the time a token takes.",
        show_default=False,
    ),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        help='Round by what the model answers about pictures: "drawn", those of seekvl\'s own corpus, or '
        "a folder of yours, where a.txt may hold the question about a.png. Wants --quantize.",
        show_default=False,
    ),
]
Pictures = Annotated[
    int | None,
    typer.Option(help="Pictures to calibrate by; at most 320 by default.", min=2, show_default=False),
]
Agreement = Annotated[
    float | None,
    typer.Option(
        help="Share of answers that shall stay word for word, 0 to 1: matrices that would change more "
        "are kept in int8, or as they were. By default only the outputs of each are bounded. Wants "
        "--calibrate.",
        min=0.0,
        max=1.0,
        show_default=False,
    ),
]
Smallest = Annotated[
    int | None,
    typer.Option(
        help="Numbers of the smallest matrix to quantise; by default 262,144, below which nothing is "
        "gained. 0 takes every one.",
        min=0,
        show_default=False,
    ),
]
Layout = Annotated[
    Literal["official", "transformers"] | None,
    typer.Option(help="Names and config files to write; those of the source by default.", show_default=False),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        help="Numbers to store what is not quantised in; those of the source by default.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option(help="Replace a checkpoint that the folder already holds.")]


def convert(
    source: Source,
    target: Target,
    *,
    quantize: Quantize = None,
    calibrate: Calibrate = None,
    pictures: Pictures = None,
    agreement: Agreement = None,
    smallest: Smallest = None,
    layout: Layout = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write a checkpoint in another form.

    A quantised folder opens like any other, at once, and answers on the CPU. What of it is stored in which
    form, and how far that is off, is printed at the end.
    """
    _check(quantize, layout=layout, calibrate=calibrate, smallest=smallest)
    if calibrate is None and (pictures is not None or agreement is not None):
        hint = "--pictures" if agreement is None else "--agreement"
        raise typer.BadParameter("goes with --calibrate drawn, or a folder", param_hint=hint)
    with options.waiting_line(f"loading {source}"):
        from seekvl.weights.save import save_checkpoint
        from seekvl.weights.save_quantized import save_quantized

        checkpoint, wanted = _loaded(source, dtype=dtype, computes=calibrate is not None)
    if quantize is None:
        with options.waiting_line(f"writing {target}"):
            save_checkpoint(
                checkpoint.model,
                target,
                config=checkpoint.config,
                tokenizer=checkpoint.folder / "tokenizer.json",
                layout=layout,
                overwrite=overwrite,
            )
        _report(target, (), json=json)
        return
    parts = None
    if calibrate is not None:
        parts = _calibrated(
            checkpoint,
            quantize,
            calibrate=calibrate,
            pictures=pictures,
            agreement=agreement,
            smallest=smallest,
        )
    matrices = save_quantized(
        checkpoint.model,
        target,
        kind=quantize,
        config=checkpoint.config,
        tokenizer=checkpoint.folder / "tokenizer.json",
        dtype=wanted,
        overwrite=overwrite,
        smallest=smallest,
        parts=parts,
        progress=options.matrices_line(),
    )
    _report(target, matrices, json=json)


def _check(quantize: str | None, *, layout: str | None, calibrate: str | None, smallest: int | None) -> None:
    """Refuse options that do not belong together."""
    if quantize is not None and layout == "transformers":
        raise typer.BadParameter("quantised checkpoints have the official layout", param_hint="--layout")
    for hint, value in (("--calibrate", calibrate), ("--smallest", smallest)):
        if quantize is None and value is not None:
            raise typer.BadParameter("goes with --quantize int8 or int4", param_hint=hint)


def _loaded(source: str, *, dtype: str | None, computes: bool) -> "tuple[Checkpoint, torch.dtype | None]":
    """Load a checkpoint, and say in which dtype to store it. computes: whether it will answer, too."""
    import torch

    from seekvl.runtime import DTYPES
    from seekvl.weights.config import read_config
    from seekvl.weights.load import find_folder, load_checkpoint

    wanted = DTYPES[dtype] if dtype is not None else read_config(find_folder(source)).dtype
    # a CPU computes in float16 slowly and roughly
    loaded = torch.float32 if computes and wanted == torch.float16 else wanted
    return load_checkpoint(source, device="cpu", dtype=loaded or "auto"), wanted


def _calibrated(
    checkpoint: "Checkpoint",
    kind: Literal["int8", "int4"],
    *,
    calibrate: str,
    pictures: int | None,
    agreement: float | None,
    smallest: int | None,
) -> "Iterator[Part]":
    """Yield what becomes of each matrix by what the model answers about pictures. It is asked when the first
    is drawn, after the folder to write has been looked at.
    """
    from seekvl.recipes.calibration import calibration_passages
    from seekvl.vlm import VLM
    from seekvl.weights.calibrate import calibrated_parts
    from seekvl.weights.quantize import check_plain

    check_plain(checkpoint.model, kind)
    vlm = VLM(checkpoint.model, checkpoint.processor)
    answered = options.counting_line("answered", "questions")
    passages = calibration_passages(vlm, calibrate, n=pictures, progress=answered)
    vlm.engine.close()
    yield from calibrated_parts(
        checkpoint.model,
        kind,
        passages,
        agreement=agreement,
        smallest=smallest,
        progress=options.counting_line("rounded", "matrices"),
        measured=options.counting_line("measured", "answers"),
    )


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
        if matrix.bare:
            experts = ", ".join(map(str, matrix.bare))
            typer.echo(
                f"rounded by themselves, as too few tokens came to them: {matrix.name}: experts {experts}"
            )
