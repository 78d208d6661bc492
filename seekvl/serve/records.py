"""What is kept and told of a prediction and of an uploaded file."""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal

Status = Literal["starting", "processing", "succeeded", "failed", "canceled"]
"""The five words that the Replicate client knows; any other one makes it fail."""


def now() -> str:
    """Return the time as clients read it, in UTC."""
    return iso(datetime.now(UTC).timestamp())


def iso(seconds: float) -> str:
    """Write seconds since 1970 as ISO 8601.

    >>> iso(0)
    '1970-01-01T00:00:00.000000Z'
    """
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(kw_only=True, slots=True)
class Prediction:
    """One prediction, as far as it has come."""

    id: str
    model: str
    """`owner/name`."""
    version: str
    input: dict[str, object]
    """As the caller gave it, unknown inputs left out."""
    owner: str = ""
    """Who may know of it, see `guard.owner_name`; callers are not told."""
    output: object = None
    status: Status = "starting"
    error: str | None = None
    logs: str = ""
    metrics: dict[str, object] = field(default_factory=dict)
    created_at: str = field(default_factory=now)
    started_at: str | None = None
    completed_at: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Its owner and id, which nothing else has together."""
        return self.owner, self.id

    @property
    def created(self) -> float:
        """Seconds since 1970 at which it was asked for."""
        return datetime.fromisoformat(self.created_at).timestamp()

    @property
    def ended(self) -> float | None:
        """Seconds since 1970 at which it ended; None while it runs."""
        return None if self.completed_at is None else datetime.fromisoformat(self.completed_at).timestamp()

    def told(self, base: str) -> dict[str, object]:
        """Return what clients are told, with addresses below `base`."""
        here = f"{base}/v1/predictions/{self.id}"
        urls = {"get": here, "cancel": f"{here}/cancel", "stream": f"{here}/stream", "web": f"{base}/"}
        known = asdict(self)
        del known["owner"]
        return {**known, "data_removed": False, "urls": urls}

    def told_starting(self, base: str) -> dict[str, object]:
        """Return it as one that has hardly begun: the only state on which a client goes on to poll."""
        return {**self.told(base), "status": "starting", "output": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One uploaded file, without its bytes."""

    id: str
    name: str
    content_type: str
    """As the caller said; nobody relies on it."""
    size: int
    sha256: str
    metadata: dict[str, object]
    purpose: str | None
    """What the OpenAI client says a file is for; None for files of other clients."""
    created: float
    """Seconds since 1970."""
    expires: float
    owner: str = ""
    """Who may know of it, see `guard.owner_name`; callers are not told."""

    def told(self, base: str) -> dict[str, object]:
        """Return what both clients are told; the OpenAI client reads times as numbers."""
        as_number = self.purpose is not None
        return {
            "id": self.id,
            "object": "file",
            "name": self.name,
            "filename": self.name,
            "content_type": self.content_type,
            "size": self.size,
            "bytes": self.size,
            "etag": self.sha256,
            "checksums": {"sha256": self.sha256},
            "metadata": self.metadata,
            "purpose": self.purpose or "vision",
            "status": "processed",
            "created_at": int(self.created) if as_number else iso(self.created),
            "expires_at": int(self.expires) if as_number else iso(self.expires),
            "urls": {"get": f"{base}/v1/files/{self.id}"},
        }
