"""`seekvl plan`: what a request will need, and whether it fits."""

import json as json_format
import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from seekvl.cli import options

if TYPE_CHECKING:
    import torch

    from seekvl.engine.plan import Plan, Size
    from seekvl.weights.config import CheckpointConfig

EXAMPLE = "Example: seekvl plan deepseek-vl2-tiny --picture 1920x1080 --new-tokens 256"

CARDS = (8, 16, 24, 40, 80)
"""Memory of usual cards and machines, GiB."""
GIB = 2**30
SIZE = re.compile(r"(\d+)x(\d+)")


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A published checkpoint by name, such as deepseek-vl-7b-chat or deepseek-vl2-small, a "
            "bundled model, or a checkpoint folder. Nothing is downloaded."
        ),
    ] = options.NANO,
    *,
    picture: Annotated[
        list[str] | None,
        typer.Option(
            help="A picture file, or a size such as 1920x1080; may be repeated.", show_default=False
        ),
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt besides pictures, those of the template counted.")
    ] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Conversations answered together.")] = 1,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes CUDA where there is one.")
    ] = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    max_tiles: options.MaxTiles = None,
    json: options.Json = False,
) -> None:
    """Say what a request needs before anything is loaded: tiles, tokens, memory, work.

    Memory is that of the busiest moment. Where it does not fit, the mildest settings that make it fit are
    named. The exit code is 0 whether it fits or not.
    """
    from seekvl.engine.budget import free_bytes
    from seekvl.engine.plan import Workload, find_config
    from seekvl.engine.plan import plan as make_plan

    config = find_config(model)
    place, here = _device(device)
    workload = Workload(
        pictures=tuple(_size(name) for name in picture or ()),
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        batch=batch,
        dtype=_dtype(dtype, config, place),
        quantize=quantize,
        max_tiles=max_tiles,
        cuda=place.type == "cuda",
    )
    available = free_bytes(place) if here else CARDS[-1] * GIB
    found = make_plan(config, workload, available=available)
    report = _report(model, found, config, available=available if here else None)
    if json:
        typer.echo(json_format.dumps(report))
    else:
        _print(report, found)


def _device(name: str) -> "tuple[torch.device, bool]":
    """Return the device to plan for, and whether this machine has it."""
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" or (name == "auto" and there):
        return torch.device("cuda"), there
    return torch.device("cpu"), True


def _dtype(name: str, config: "CheckpointConfig", place: "torch.device") -> "torch.dtype":
    """Return the dtype that loading would take."""
    import torch

    from seekvl.models.cost import parameters
    from seekvl.runtime import DTYPES, select_dtype

    numbers = sum(parameters(config.model).values())
    if place.type == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16 if name == "auto" else DTYPES[name]
    return select_dtype(name, device=place, parameters=numbers)


def _size(name: str) -> "Size":
    """Return width and height of a picture, given as such or as a file."""
    found = SIZE.fullmatch(name)
    if found:
        return int(found[1]), int(found[2])
    from seekvl.processing.pad_image import upright
    from seekvl.processing.picture import open_picture

    return upright(open_picture(name)).size


def _report(
    name: str, plan: "Plan", config: "CheckpointConfig", *, available: int | None
) -> dict[str, object]:
    """Return everything the plan says, as JSON holds it."""
    from seekvl.engine.plan import plan as make_plan
    from seekvl.engine.plan import remedy

    room = {str(card): card * GIB for card in CARDS}
    if available is not None:
        room["here"] = available
    fits: dict[str, object] = {}
    for label, size in room.items():
        total = make_plan(config, plan.workload, available=size).total
        cure = None if total <= size else remedy(config, plan.workload, available=size)
        fits[label] = {"bytes": size, "fits": total <= size, "with": cure and cure[0]}
    work = plan.workload
    return {
        "model": name,
        "device": "cuda" if work.cuda else "cpu",
        "dtype": str(work.dtype).removeprefix("torch."),
        "quantize": plan.kind,
        "batch": work.batch,
        "pictures": [
            {"size": list(p.size), "grid": p.grid and list(p.grid), "views": p.views, "tokens": p.tokens}
            for p in plan.pictures
        ],
        "tokens": {
            "prompt": plan.prompt_tokens,
            "pictures": sum(p.tokens for p in plan.pictures),
            "text": work.text_tokens,
            "answer": work.new_tokens,
            "limit": plan.limit,
        },
        "bytes": {
            "weights": plan.weights,
            "cache": plan.cache,
            "activations": plan.activations,
            "program": plan.program,
            "total": plan.total,
        },
        "flops": {"vision": plan.vision_flops, "prefill": plan.prefill_flops},
        "bytes_per_token": plan.token_bytes,
        "fits": fits,
    }


def _print(report: dict[str, object], plan: "Plan") -> None:
    """Print the plan for people."""
    work, limit = plan.workload, plan.limit
    kind = "" if plan.kind is None else f", language model in {plan.kind}"
    typer.echo(f"{report['model']}, {report['dtype']}{kind} on {report['device']}, batch {work.batch}")
    for number, picture in enumerate(plan.pictures, start=1):
        width, height = picture.size
        grid = "" if picture.grid is None else f"  grid {picture.grid[0]} x {picture.grid[1]}"
        views = "" if picture.grid is None else f"  {picture.views} tile{'s' * (picture.views > 1)}"
        typer.echo(f"  picture {number:<4} {width} x {height} px{grid}{views}  {picture.tokens:,} tokens")
    typer.echo(f"  prompt       {plan.prompt_tokens:,} of {limit:,} tokens, answer up to {work.new_tokens:,}")
    parts = {
        "weights": plan.weights,
        "cache": plan.cache,
        "activations": plan.activations,
        "program": plan.program,
        "total": plan.total,
    }
    for label, size in parts.items():
        typer.echo(f"  {label:<11} {_gib(size):>9}")
    typer.echo(
        f"  work         {_tera(plan.vision_flops)} for the pictures, {_tera(plan.prefill_flops)} for the "
        f"prompt; {_gib(plan.token_bytes)} read per token"
    )
    fits = report["fits"]
    assert isinstance(fits, dict)
    for label, entry in fits.items():
        here = label == "here"
        place = f"free here ({_gib(entry['bytes'])})" if here else f"{label} GiB"
        typer.echo(f"  {place:<22} {_verdict(entry)}")


def _verdict(entry: dict[str, object]) -> str:
    """Say whether it fits, and what makes it fit."""
    if entry["fits"]:
        return "fits"
    settings = entry["with"]
    return f"fits with {', '.join(settings)}" if isinstance(settings, list) else "does not fit"


def _gib(size: int) -> str:
    """Write bytes in the unit that suits them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _tera(operations: int) -> str:
    """Write operations in the unit that suits them."""
    return f"{operations / 1e12:.2f} TFLOP" if operations >= 1e10 else f"{operations / 1e9:.2f} GFLOP"
