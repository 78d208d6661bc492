"""What one start of the server is told: the model, where it listens, whom it trusts, how much it takes."""

import base64
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from seekvl.processing.choices import Preprocessing
from seekvl.runtime import SeekVLError

MEBIBYTE = 2**20
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""Names under which a server on this machine is asked; any other in `Host` may be a rebound DNS name."""
PIXEL_CEILING = 100_000_000
"""Pixels of a picture that no setting goes beyond: imaging libraries refuse only at about 179 million."""


def signing_key(secret: str) -> bytes:
    r"""Return the key of a webhook secret. Raises SeekVLError for what is none.

    >>> signing_key("whsec_AAEC")
    b'\x00\x01\x02'
    """
    try:
        if not secret.startswith("whsec_") or secret == "whsec_":
            raise ValueError
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError as error:
        raise SeekVLError("a webhook secret is whsec_ and a key in base64") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything a server is told. Raises SeekVLError for what cannot be meant."""

    model: str = "seekvl-nano"
    """A bundled model, a folder, or a hub id."""
    name: str | None = None
    """Name clients ask for, `owner/name`; None makes it from `model`."""
    device: str = "auto"
    dtype: str = "auto"
    quantize: Literal["int8", "int4", "fp8"] | None = None
    preprocessing: Preprocessing = "seekvl"
    max_tiles: int | None = None
    """Most tiles of a picture, for DeepSeek-VL2; requests may ask for fewer."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port."""
    api_keys: tuple[str, ...] = ()
    """Any of these opens the routes; without one everybody may ask."""
    open_metrics: bool = True
    """Whether `/metrics` is told without a key."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names that `Host` may hold; `*` accepts all. Loopback names always may."""
    cors_origins: tuple[str, ...] = ()
    """Origins, such as `https://example.org`, whose pages may ask from a browser; none by default."""

    max_body: int = 40 * MEBIBYTE
    """Most bytes of a request."""
    max_picture_bytes: int = 20 * MEBIBYTE
    """Most bytes of one encoded picture."""
    max_pixels: int = 64_000_000
    """Most pixels of one picture, read from its header before it is decoded."""
    max_pictures: int = 16
    """Most pictures of a request."""
    fetch: bool = True
    """Whether pictures are fetched from `http:` and `https:` addresses, and webhooks are called."""
    fetch_hosts: tuple[str, ...] = ()
    """Hosts or networks that pictures and webhooks may lead to; with any given, nothing else. They may be
    private.
    """
    fetch_seconds: float = 10.0
    """Time for one picture, redirects included."""
    file_root: Path | None = None
    """Folder whose pictures `file:` addresses may name; None: none."""

    replicas: int = 1
    """Models that answer: one in this process, more through Ray Serve; see `serve.replicas`."""
    queue: int = 64
    """Most requests that wait for a place in the engine, or in all of the replicas."""
    wait_seconds: float = 60.0
    """Longest wait for such a place."""
    answer_seconds: float = 600.0
    """Longest time for one answer, waiting included."""
    grace_seconds: float = 30.0
    """Time that running answers have when the server is told to stop."""

    store: str | None = None
    """`sqlite:///path` keeps predictions and files through a restart; None keeps them in memory. An absolute
    path makes it four slashes.
    """
    prediction_seconds: float = 3600.0
    """How long a finished prediction can be asked for."""
    max_predictions: int = 1000
    """Most finished predictions that are kept."""
    file_seconds: float = 86_400.0
    """How long an uploaded file is kept."""
    max_prediction_bytes: int = 256 * MEBIBYTE
    """Most bytes of all finished predictions, their inputs and drawn pictures included; the oldest go."""
    max_file_bytes: int = 1024 * MEBIBYTE
    """Most bytes of all uploaded files."""
    cog_inputs: Literal["full", "simple"] = "full"
    """Which of the two models the Cog routes serve: several pictures and a drawn one back, or the simple one.
    """
    webhook_secret: str | None = None
    """`whsec_` and a key in base64, to sign webhooks with; None makes one and keeps it in the store."""
    upload_url: str | None = None
    """Address below which drawn pictures are put instead of coming as data: URLs; None: nowhere."""
    log_prompts: Path | None = None
    """Folder to keep whole requests in, for `seekvl replay`; None keeps no word of them."""

    def __post_init__(self) -> None:
        for field in (
            "max_body",
            "max_picture_bytes",
            "max_pixels",
            "max_pictures",
            "replicas",
            "queue",
            "max_predictions",
            "max_prediction_bytes",
            "max_file_bytes",
        ):
            if getattr(self, field) < 1:
                raise SeekVLError(f"{field} is {getattr(self, field)}; it must be at least 1")
        if self.max_pixels > PIXEL_CEILING:
            raise SeekVLError(f"max_pixels is {self.max_pixels:,}; at most {PIXEL_CEILING:,} are safe")
        for field in (
            "fetch_seconds",
            "wait_seconds",
            "answer_seconds",
            "prediction_seconds",
            "file_seconds",
        ):
            if not 0 < getattr(self, field) < float("inf"):
                raise SeekVLError(f"{field} is {getattr(self, field)}; it must be above 0 and finite")
        if not 0 <= self.port <= 65535:
            raise SeekVLError(f"port {self.port} is none: ports are 0 to 65535")
        if any(not key.strip() for key in self.api_keys):
            raise SeekVLError("an API key is empty; leave it out, or give it letters")
        if "*" in self.cors_origins:
            raise SeekVLError("cors_origins holds '*': name each origin whose pages may ask")
        if self.store is not None and not self.store.startswith("sqlite:///"):
            raise SeekVLError(f"store {self.store!r} is unknown; use sqlite:///path, or none for memory")
        if self.webhook_secret is not None:
            signing_key(self.webhook_secret)
        if self.upload_url is not None and urlsplit(self.upload_url).scheme not in ("http", "https"):
            raise SeekVLError(f"upload_url {self.upload_url!r} is no http: or https: address")
        if self.name is not None and (self.name.count("/") != 1 or not all(self.name.split("/"))):
            raise SeekVLError(f"the name {self.name!r} must be owner/name, as clients ask for it")

    @property
    def model_name(self) -> str:
        """The name clients ask for."""
        if self.name is not None:
            return self.name
        if self.model.count("/") == 1 and not Path(self.model).exists():
            return self.model
        known = Path(self.model).exists()
        return f"local/{Path(self.model).resolve().name}" if known else f"seekvl/{self.model}"

    @property
    def exposed(self) -> bool:
        """Whether others than this machine can reach the server."""
        if self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return True
