"""`seekvl serve`: one server for the clients of OpenAI, Cog and Replicate."""

import logging
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from seekvl.cli import options

EXAMPLE = "Example: seekvl serve --port 8000, then OPENAI_BASE_URL=http://127.0.0.1:8000/v1 for any client"
KEYS = "SEEKVL_API_KEYS"
SECRET = "SEEKVL_WEBHOOK_SECRET"

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
Replicas = Annotated[
    int,
    typer.Option(
        min=1,
        help="Copies of the model that answer; from 2 on through Ray Serve (extra `cluster`), on this "
        "machine or on the Ray cluster that RAY_ADDRESS names.",
    ),
]
Queue = Annotated[int, typer.Option(min=1, help="Most requests that wait; more are refused.")]
Grace = Annotated[float, typer.Option(min=0, help="Seconds for running answers when told to stop.")]
Store = Annotated[
    str | None,
    typer.Option(
        help="sqlite:///path keeps predictions and uploaded files through a restart (an absolute path makes "
        "it four slashes); without it they are in memory.",
        show_default=False,
    ),
]
KeepPredictions = Annotated[
    float, typer.Option(min=1, help="Seconds for which a finished prediction can be asked for.")
]
MaxPredictions = Annotated[int, typer.Option(min=1, help="Most finished predictions that are kept.")]
KeepFiles = Annotated[float, typer.Option(min=1, help="Seconds for which an uploaded file is kept.")]
MaxFileBytes = Annotated[int, typer.Option(min=1, help="Most bytes of all uploaded files.")]
CogInputs = Annotated[
    Literal["full", "simple"],
    typer.Option(
        help="Model of the Cog routes (/predictions): full takes text and up to three pictures and draws "
        "boxes, simple takes a picture and a prompt. The Replicate routes serve both."
    ),
]
UploadUrl = Annotated[
    str | None,
    typer.Option(
        help="Address below which drawn pictures are put (HTTP PUT); without it they come as data: URLs.",
        show_default=False,
    ),
]
WebhookSecret = Annotated[
    str | None,
    typer.Option(
        envvar=SECRET,
        help="whsec_ and a key in base64, to sign webhooks with; by default one is made and kept in store.",
        show_default=False,
    ),
]
LogPrompts = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="Folder to keep whole requests in, pictures too, for seekvl replay; nothing deletes them.",
        show_default=False,
    ),
]
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
    replicas: Replicas = 1,
    queue: Queue = 64,
    grace: Grace = 30.0,
    store: Store = None,
    keep_predictions: KeepPredictions = 3600.0,
    max_predictions: MaxPredictions = 1000,
    keep_files: KeepFiles = 86_400.0,
    max_file_bytes: MaxFileBytes = 2**30,
    cog_inputs: CogInputs = "full",
    upload_url: UploadUrl = None,
    webhook_secret: WebhookSecret = None,
    log_prompts: LogPrompts = None,
    verbose: Verbose = False,
) -> None:
    """Answer over HTTP until SIGTERM or Ctrl-C; needs the extra `server`."""
    from seekvl.runtime import require

    for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "httpcore2"):
        require(module, extra="server")
    from seekvl.serve.deploy import require_ray
    from seekvl.serve.run import serve as run
    from seekvl.serve.settings import Settings

    if replicas > 1:
        require_ray()
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
        replicas=replicas,
        queue=queue,
        grace_seconds=grace,
        store=store,
        prediction_seconds=keep_predictions,
        max_predictions=max_predictions,
        file_seconds=keep_files,
        max_file_bytes=max_file_bytes,
        cog_inputs=cog_inputs,
        upload_url=upload_url,
        webhook_secret=webhook_secret,
        log_prompts=log_prompts,
    )
    typer.echo(f"{settings.model_name} on http://{host}:{port} (Ctrl-C stops)", err=True)
    raise typer.Exit(run(settings))
