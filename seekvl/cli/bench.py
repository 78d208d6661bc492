"""`seekvl bench`: how fast a model answers here, and what share of the machine's ceilings that is."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from seekvl.cli import options

EXAMPLE = "Example: seekvl bench --batch 1 --batch 4 --plot roofline.png"


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="A bundled model, a checkpoint folder, or a published checkpoint by name, such as "
            "deepseek-vl-1.3b-chat: of that random weights are made at the true dimensions, nothing is "
            "downloaded."
        ),
    ] = options.NANO,
    *,
    peer: Annotated[
        Literal["transformers", "llama.cpp"] | None,
        typer.Option(
            help="Measure this program as well: same weights, in alternation, after both have given the same "
            "answers. transformers has DeepSeek-VL, not DeepSeek-VL2, and not seekvl-nano. llama.cpp runs "
            "the text part of a DeepSeek-VL only: both are asked in words, one answer at a time; with "
            "--quantize int8 or int4 it computes in its Q8_0 or Q4_0.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Answers decoded together; may be repeated. By default 1, 4 and 16; beside llama.cpp 1.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of every answer.")] = 32,
    rounds: Annotated[
        int, typer.Option(min=1, help="Processes of each program; figures are their medians.")
    ] = 3,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of each program; by default as many as torch takes.", show_default=False
        ),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    quiet: Annotated[
        float, typer.Option(min=0, help="Seconds to wait before each process for a machine that is idle.")
    ] = 20.0,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            file_okay=False,
            help="Keep the random weights of a published name here, quantised ones beside it, and take them "
            "from there.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", dir_okay=False, help="Draw the roofline with what was measured."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure load, picture, prompt, decoding and memory on this machine's CPU, or on a CUDA device.

    The machine's ceilings come first: bytes read from memory a second, on a GPU bytes copied, and operations
    of matrix products. Each figure is printed with its share of the ceiling that bounds it.
    """
    import torch

    from seekvl.evals.roofline import check_plot, draw_roofline
    from seekvl.evals.speed import Settings
    from seekvl.evals.speed import bench as measure
    from seekvl.runtime import require

    if plot is not None:
        check_plot(plot)
        require("matplotlib", extra="data")
    settings = Settings(
        dtype=dtype,
        device=device,
        quantize=quantize,
        threads=threads or torch.get_num_threads(),
        batches=tuple(batch or ()),
        tokens=tokens,
        rounds=rounds,
        quiet=quiet,
        peer=peer,
    )
    report = measure(model, settings, folder=folder, say=lambda line: typer.echo(line, err=True))
    typer.echo(report.json() if json else report.table())
    if plot is not None:
        draw_roofline(report, plot)
