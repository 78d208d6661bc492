"""`seekvl serve`: one server for the clients of OpenAI, Cog and Replicate."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from seekvl.cli import options

EXAMPLE = "Example: seekvl serve --port 8000, then OPENAI_BASE_URL=http://127.0.0.1:8000/v1 for any client"
KEYS = "SEEKVL_API_KEYS"

Host = Annotated[
    str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine alone, 0.0.0.0 all.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any free one.")]
Name = Annotated[
    str | None, typer.Option(help="Name clients ask for, owner/name; by default made from the model.")
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(help=f"Key that opens the routes; may be repeated, or given in {KEYS}, split by commas."),
]
AllowedHost = Annotated[
    list[str] | None, typer.Option(help="Further name under which the server may be asked; may be repeated.")
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(help="Origin whose pages may ask from a browser, as https://example.org; may be repeated."),
]
Fetch = Annotated[
    bool, typer.Option("--fetch/--no-fetch", help="Fetch pictures from public http(s) addresses.")
]
FetchHost = Annotated[
    list[str] | None,
    typer.Option(help="Host or network that may be fetched from, and no other; may be repeated."),
]
FileRoot = Annotated[
    Path | None,
    typer.Option(file_okay=False, exists=True, help="Folder whose pictures file: addresses may name."),
]
Queue = Annotated[int, typer.Option(min=1, help="Most requests that wait; more are refused.")]
Grace = Annotated[float, typer.Option(min=0, help="Seconds for running answers when told to stop.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Log a line for every request.")]


def serve(
    *,
    model: options.Model = options.NANO,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    preprocessing: options.Preprocessing = "seekvl",
    max_tiles: options.MaxTiles = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    api_key: ApiKey = None,
    allowed_host: AllowedHost = None,
    cors_origin: CorsOrigin = None,
    fetch: Fetch = True,
    fetch_host: FetchHost = None,
    file_root: FileRoot = None,
    queue: Queue = 64,
    grace: Grace = 30.0,
    verbose: Verbose = False,
) -> None:
    """Answer over HTTP until SIGTERM or Ctrl-C; needs the extra `server`."""
    from seekvl.runtime import require

    for module in ("fastapi", "uvicorn", "prometheus_client", "multipart", "httpcore2"):
        require(module, extra="server")
    from seekvl.serve.run import serve as run
    from seekvl.serve.settings import Settings

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    keys = [*(api_key or []), *filter(None, os.environ.get(KEYS, "").split(","))]
    settings = Settings(
        model=model,
        name=name,
        device=device,
        dtype=dtype,
        quantize=quantize,
        preprocessing=preprocessing,
        max_tiles=max_tiles,
        host=host,
        port=port,
        api_keys=tuple(keys),
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        fetch=fetch,
        fetch_hosts=tuple(fetch_host or ()),
        file_root=file_root,
        queue=queue,
        grace_seconds=grace,
    )
    typer.echo(f"{settings.model_name} on http://{host}:{port} (Ctrl-C stops)", err=True)
    raise typer.Exit(run(settings))
