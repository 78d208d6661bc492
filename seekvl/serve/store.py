"""What outlives a request: predictions and uploaded files, in SQLite, in memory or in a file.

predictions    owner, id, created, ended (null while it runs), size in bytes, its record as JSON
files          id, created, expires, size in bytes, about it as JSON, its bytes, owner
facts          name, value: what one start of the server tells the next

Nobody finds what another owner has, and two of them may choose the same id. All work is done in one thread,
in the order of the calls; a call that writes returns when its writing is on the disk. A file is for one
server at a time.
"""

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Literal, TypeVar

from seekvl.runtime import SeekVLError
from seekvl.serve.errors import ApiError
from seekvl.serve.records import FileRecord, Prediction, now
from seekvl.serve.settings import Settings

Found = TypeVar("Found")

TABLES = """
CREATE TABLE IF NOT EXISTS predictions
    (owner TEXT NOT NULL, id TEXT NOT NULL, created REAL NOT NULL, ended REAL, size INTEGER NOT NULL,
     record TEXT NOT NULL, PRIMARY KEY (owner, id));
CREATE INDEX IF NOT EXISTS by_age ON predictions (owner, created, id);
CREATE INDEX IF NOT EXISTS by_end ON predictions (ended, size, owner, id);
CREATE TABLE IF NOT EXISTS files
    (id TEXT PRIMARY KEY, created REAL NOT NULL, expires REAL NOT NULL, size INTEGER NOT NULL,
     about TEXT NOT NULL, data BLOB NOT NULL, owner TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
WITHOUT_OWNERS = f"""
BEGIN;
DROP INDEX by_age;
DROP INDEX by_end;
ALTER TABLE predictions RENAME TO former;
ALTER TABLE files ADD COLUMN owner TEXT NOT NULL DEFAULT '';
{TABLES}
INSERT INTO predictions SELECT '', id, created, ended, size, record FROM former;
DROP TABLE former;
COMMIT;
"""
"""Brings a store of the first form into this one. What is in it belongs to those who ask without a key."""
PAGE = 50
"""Predictions of a page of the list."""
PAGE_BYTES = 8 * 2**20
"""A page ends after this many bytes of records, however few they are."""
INTERRUPTED = "the server stopped while this prediction ran; ask again"


class Store:
    """Keeps predictions and files within bounds of number, bytes and time.

    Raises SeekVLError for a file that cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seekvl-store")
        self._database = _open(settings.store)
        self._fail_interrupted()

    async def save(self, prediction: Prediction) -> None:
        """Write a prediction as it is now; a finished one may push the oldest finished ones out."""
        known, created, ended = asdict(prediction), prediction.created, prediction.ended
        await self._run(lambda: self._save(known, created=created, ended=ended))

    async def prediction(self, name: str, *, owner: str = "") -> Prediction | None:
        """Return a prediction; None where it is unknown, somebody else's, or was kept long enough."""

        def find() -> Prediction | None:
            """Look it up; runs in the store's thread."""
            row = self._database.execute(
                "SELECT record FROM predictions WHERE owner = ? AND id = ? AND (ended IS NULL OR ended > ?)",
                (owner, name, time.time() - self.settings.prediction_seconds),
            ).fetchone()
            return None if row is None else Prediction(**json.loads(row[0]))

        return await self._run(find)

    async def predictions(
        self, *, cursor: str | None, owner: str = ""
    ) -> tuple[list[Prediction], str | None]:
        """Return a page of somebody's predictions, newest first, and the cursor of the next page.

        Raises ApiError for a cursor that is none.
        """
        before = _read_cursor(cursor)

        def find() -> tuple[list[Prediction], str | None]:
            """Look it up; runs in the store's thread."""
            rows = self._database.execute(
                "SELECT created, id, size, record FROM predictions WHERE owner = ? "
                "AND (created, id) < (?, ?) AND (ended IS NULL OR ended > ?) ORDER BY created DESC, id DESC",
                (owner, *before, time.time() - self.settings.prediction_seconds),
            )
            page: list[Prediction] = []
            taken, last = 0, ""
            for created, name, size, record in rows:
                if len(page) == PAGE or (page and taken + size > PAGE_BYTES):
                    return page, last
                page.append(Prediction(**json.loads(record)))
                taken, last = taken + size, f"{created!r}:{name}"
            return page, None

        return await self._run(find)

    async def forget(self, name: str, *, owner: str = "") -> None:
        """Delete a prediction, as if it had never been asked for."""

        def delete() -> None:
            """Delete it; runs in the store's thread."""
            with self._database:
                self._database.execute("DELETE FROM predictions WHERE owner = ? AND id = ?", (owner, name))

        await self._run(delete)

    async def add_file(self, record: FileRecord, data: bytes) -> None:
        """Keep a file. Raises ApiError (413) where there is no room for it."""
        await self._run(lambda: self._add_file(record, data))

    async def file(self, name: str, *, owner: str = "") -> FileRecord | None:
        """Return what is known of a file; None where it is unknown, somebody else's, or has expired."""
        row = await self._row("about", name, owner=owner)
        return None if row is None else FileRecord(**json.loads(str(row)))

    async def file_data(self, name: str, *, owner: str = "") -> bytes | None:
        """Return the bytes of a file; None as above."""
        row = await self._row("data", name, owner=owner)
        return row if isinstance(row, bytes) else None

    async def files(self, *, owner: str = "") -> list[FileRecord]:
        """Return all files of somebody, newest first."""

        def find() -> list[FileRecord]:
            """Look it up; runs in the store's thread."""
            rows = self._database.execute(
                "SELECT about FROM files WHERE owner = ? AND expires > ? ORDER BY created DESC, id",
                (owner, time.time()),
            )
            return [FileRecord(**json.loads(about)) for (about,) in rows]

        return await self._run(find)

    async def delete_file(self, name: str, *, owner: str = "") -> bool:
        """Forget a file; return whether there was one."""

        def delete() -> bool:
            """Delete it; runs in the store's thread."""
            with self._database:
                found = self._database.execute("DELETE FROM files WHERE id = ? AND owner = ?", (name, owner))
            return found.rowcount > 0

        return await self._run(delete)

    async def fact(self, name: str, *, make: Callable[[], str]) -> str:
        """Return what was noted under a name; the first time, note what `make` returns."""

        def find() -> str:
            """Look it up; runs in the store's thread."""
            with self._database:
                self._database.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, make()))
            (value,) = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
            return str(value)

        return await self._run(find)

    async def close(self) -> None:
        """End; what was written stays."""
        await self._run(self._database.close)
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[], Found]) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _row(self, column: Literal["about", "data"], name: str, *, owner: str) -> object:
        """Return a column of the row of a file that has not expired."""
        query = f"SELECT {column} FROM files WHERE id = ? AND owner = ? AND expires > ?"

        def find() -> object:
            """Look it up; runs in the store's thread."""
            row = self._database.execute(query, (name, owner, time.time())).fetchone()
            return None if row is None else row[0]

        return await self._run(find)

    def _save(self, known: dict[str, object], *, created: float, ended: float | None) -> None:
        record = json.dumps(known)  # here in the thread: a picture makes it long
        with self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO predictions VALUES (?, ?, ?, ?, ?, ?)",
                (known["owner"], known["id"], created, ended, len(record), record),
            )
            if ended is not None:
                self._push_out(keep=(str(known["owner"]), str(known["id"])))

    def _push_out(self, *, keep: tuple[str, str]) -> None:
        """Delete finished predictions that are too old, too many or too large together."""
        self._database.execute(
            "DELETE FROM predictions WHERE ended <= ?", (time.time() - self.settings.prediction_seconds,)
        )
        number, taken, gone = 0, 0, []
        rows = self._database.execute(
            "SELECT owner, id, size FROM predictions WHERE ended IS NOT NULL ORDER BY ended DESC"
        )
        for owner, name, size in rows:
            number, taken = number + 1, taken + size
            too_many = number > self.settings.max_predictions
            if (owner, name) != keep and (too_many or taken > self.settings.max_prediction_bytes):
                gone.append((owner, name))
        self._database.executemany("DELETE FROM predictions WHERE owner = ? AND id = ?", gone)

    def _add_file(self, record: FileRecord, data: bytes) -> None:
        most = self.settings.max_file_bytes
        with self._database:
            self._database.execute("DELETE FROM files WHERE expires <= ?", (time.time(),))
            (taken,) = self._database.execute("SELECT COALESCE(SUM(size), 0) FROM files").fetchone()
            if taken + record.size > most:
                raise ApiError(
                    status=413,
                    message=f"the file has {record.size:,} bytes, and {taken:,} of {most:,} are taken by "
                    "others; delete some",
                )
            self._database.execute(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(record.id, record.created, record.expires, record.size),
                    *(json.dumps(asdict(record)), data, record.owner),
                ),
            )

    def _fail_interrupted(self) -> None:
        """Tell predictions that ran when the server before this one stopped as failed."""
        rows = self._database.execute("SELECT record FROM predictions WHERE ended IS NULL").fetchall()
        for (record,) in rows:
            prediction = Prediction(**json.loads(record))
            prediction.status, prediction.error, prediction.completed_at = "failed", INTERRUPTED, now()
            self._save(asdict(prediction), created=prediction.created, ended=prediction.ended)


def _open(store: str | None) -> sqlite3.Connection:
    """Open the database. Raises SeekVLError."""
    path = ":memory:" if store is None else store.removeprefix("sqlite:///")
    try:
        if store is not None:
            Path(path).touch(mode=0o600)  # what people ask is nobody else's to read
        database = sqlite3.connect(path, check_same_thread=False, timeout=1.0)
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        columns = {name for _, name, *_ in database.execute("PRAGMA table_info(predictions)")}
        database.executescript(WITHOUT_OWNERS if columns and "owner" not in columns else TABLES)
        with database:  # takes the lock now rather than at the first prediction
            database.execute("INSERT OR REPLACE INTO facts VALUES ('format', '2')")
    except (OSError, sqlite3.Error) as error:
        raise SeekVLError(f"the store {path} cannot be used: {error}; does another server use it?") from error
    return database


def _read_cursor(cursor: str | None) -> tuple[float, str]:
    """Return what the predictions of a page come after."""
    if cursor is None:
        return float("inf"), ""
    created, _, name = cursor.partition(":")
    try:
        return float(created), name
    except ValueError as error:
        raise ApiError(status=422, message=f"the cursor {cursor[:80]!r} is none", param="cursor") from error
