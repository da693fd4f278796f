"""Media on disk, by their SHA-256: stored once, within a quota, for a time.

A folder holds `blobs/` (complete media), `incoming/` (what is being received) and `index.sqlite`. A
medium is complete when it is renamed into `blobs/` and is known when its row is committed; whatever
a crash leaves between the two is removed at the next start. SQLite does the book-keeping because a
transaction is what makes that safe.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import sqlite3
import time
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import StoreSettings

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS blobs (
    digest TEXT PRIMARY KEY, bytes INTEGER NOT NULL, used REAL NOT NULL, facts TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blobs_by_use ON blobs (used);
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, number INTEGER NOT NULL, digest TEXT NOT NULL
        REFERENCES blobs ON DELETE CASCADE,
    name TEXT NOT NULL, purpose TEXT NOT NULL, created INTEGER NOT NULL, expires INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS files_by_tenant ON files (tenant, number);
CREATE INDEX IF NOT EXISTS files_by_digest ON files (digest);
"""
_BUFFER = 1 << 20
_EVICT_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored medium."""

    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class File:
    """A medium that a tenant uploaded under a name."""

    id: str
    digest: str
    nbytes: int
    name: str
    purpose: str
    created: int
    expires: int
    number: int


class Store:
    """The media of one gateway process."""

    def __init__(self, settings: StoreSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._root = settings.path.absolute()
        self._blobs = self._root / "blobs"
        self._incoming = self._root / "incoming"
        self._pins: Counter[str] = Counter()
        self._used = 0
        self._lock: IO[str] | None = None
        self._db: sqlite3.Connection | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, those of unfinished uploads too."""
        return self._used

    # -- opening -------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the folder over and repair what a crash left.

        Raises:
            SettingsError: another process has it, or it cannot be written.
        """
        try:
            self._blobs.mkdir(parents=True, exist_ok=True, mode=0o700)
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._lock = (self._root / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._incoming.mkdir(exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(self._root / "index.sqlite", isolation_level=None)
        except BlockingIOError:
            raise SettingsError(f"store.path: another process uses {self._root}") from None
        except OSError as error:
            raise SettingsError(
                f"store.path: {self._root} cannot be used ({error.strerror})"
            ) from None
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(_SCHEMA)
        self._repair()
        self.sweep()

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
        if self._lock is not None:
            self._lock.close()

    def _repair(self) -> None:
        # Nobody can name a medium that came with a request of the process before.
        self._execute(
            "DELETE FROM blobs WHERE NOT EXISTS "
            "(SELECT 1 FROM files WHERE files.digest = blobs.digest)"
        )
        known = dict(self._execute("SELECT digest, bytes FROM blobs"))
        on_disk = {}
        for path in self._blobs.glob("*/*"):
            size = path.stat().st_size
            if known.get(path.name) == size:
                on_disk[path.name] = size
            else:
                path.unlink()
        lost = [(digest,) for digest in known if digest not in on_disk]
        self._database.executemany("DELETE FROM blobs WHERE digest = ?", lost)
        self._execute("UPDATE blobs SET facts = NULL")  # the limits may have changed
        self._count(sum(on_disk.values()) - self._used)

    # -- media ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def receive(self, *, durable: bool = False) -> AsyncIterator[Upload]:
        """Receive a medium: `write` it, then `commit` it; otherwise nothing of it stays.

        Args:
            durable: whether a committed medium outlives a power failure, at the cost of a sync.
        """
        upload = Upload(self, self._incoming / secrets.token_hex(16), durable)
        try:
            yield upload
        finally:
            await upload.discard()
            self._count(-upload.reserved)

    @contextmanager
    def pinned(self, digest: str) -> Iterator[Path]:
        """The path of a medium, which stays there inside the block.

        Raises:
            ApiError: 404 if it is gone.
        """
        self._pins[digest] += 1
        try:
            path = self._path(digest)
            if not path.is_file():
                raise not_found()
            self._execute("UPDATE blobs SET used = ? WHERE digest = ?", time.time(), digest)
            yield path
        finally:
            self._pins[digest] -= 1
            if not self._pins[digest]:
                del self._pins[digest]

    def facts(self, digest: str) -> dict[str, Any] | None:
        """What probing said about a medium."""
        rows = self._execute("SELECT facts FROM blobs WHERE digest = ?", digest)
        return json.loads(rows[0][0]) if rows and rows[0][0] else None

    def remember_facts(self, digest: str, facts: dict[str, Any]) -> None:
        self._execute("UPDATE blobs SET facts = ? WHERE digest = ?", json.dumps(facts), digest)

    def sweep(self) -> None:
        """Remove what is too old."""
        now = time.time()
        self._execute("DELETE FROM files WHERE expires < ?", now)
        old = now - self._settings.media_ttl_s
        rows = self._execute(
            "SELECT digest, bytes FROM blobs WHERE used < ? "
            "AND NOT EXISTS (SELECT 1 FROM files WHERE files.digest = blobs.digest)",
            old,
        )
        self._remove([row for row in rows if not self._pins[row[0]]])

    def discard_unused(self, digest: str) -> None:
        """Remove a medium that turned out to be refused, unless somebody else uses it."""
        rows = self._execute(
            "SELECT digest, bytes FROM blobs WHERE digest = ? "
            "AND NOT EXISTS (SELECT 1 FROM files WHERE files.digest = blobs.digest)",
            digest,
        )
        self._remove([row for row in rows if not self._pins[digest]])

    # -- files ---------------------------------------------------------------------------------

    def add_file(self, tenant: str, blob: Blob, name: str, purpose: str) -> File:
        now = time.time()
        number = time.time_ns()
        file = File(
            id=f"file-{secrets.token_urlsafe(18)}",
            digest=blob.digest,
            nbytes=blob.nbytes,
            name=name,
            purpose=purpose,
            created=int(now),
            expires=math.ceil(now + self._settings.file_ttl_s),
            number=number,
        )
        self._execute(
            "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(file.id, tenant, number, file.digest, name, purpose, file.created, file.expires),
        )
        return file

    def file(self, tenant: str, file_id: str) -> File:
        """A tenant's file; 404 if it has none of that id."""
        rows = self._files("files.tenant = ? AND files.id = ?", tenant, file_id)
        if not rows:
            raise not_found()
        return rows[0]

    def files(self, tenant: str, after: str | None, limit: int) -> list[File]:
        """Up to `limit` files of a tenant, newest first, older than the file `after`."""
        before = self.file(tenant, after).number if after else 1 << 62
        return self._files(
            "files.tenant = ? AND files.number < ? ORDER BY files.number DESC LIMIT ?",
            *(tenant, before, limit),
        )

    def delete_file(self, tenant: str, file_id: str) -> None:
        digest = self.file(tenant, file_id).digest
        self._execute("DELETE FROM files WHERE id = ?", file_id)
        self.discard_unused(digest)

    def _files(self, where: str, *values: Any) -> list[File]:
        rows = self._execute(
            "SELECT id, digest, bytes, name, purpose, created, expires, number "
            f"FROM files JOIN blobs USING (digest) WHERE {where}",
            *values,
        )
        return [File(*row) for row in rows]

    # -- room ----------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> None:
        """Make room for bytes to come; 503 if there is none."""
        quota = self._settings.quota_bytes
        while self._used + nbytes > quota:
            rows = self._execute(
                "SELECT digest, bytes FROM blobs ORDER BY EXISTS "
                "(SELECT 1 FROM files WHERE files.digest = blobs.digest), used LIMIT ?",
                _EVICT_AT_ONCE + len(self._pins),
            )
            free = [row for row in rows if not self._pins[row[0]]]
            if not free:
                raise ApiError(
                    503, "There is no room for media.", code="storage_full", retry_after=10
                )
            needed = self._used + nbytes - quota
            chosen = []
            for row in free:
                if needed <= 0:
                    break
                chosen.append(row)
                needed -= row[1]
            self._remove(chosen)
        self._count(nbytes)

    def admit(self, digest: str, nbytes: int, incoming: Path, *, durable: bool) -> Blob:
        """Take a received medium into the store. Runs on the event loop: two renames, two rows."""
        target = self._path(digest)
        now = time.time()
        if self._execute("SELECT 1 FROM blobs WHERE digest = ?", digest) and target.is_file():
            self._execute("UPDATE blobs SET used = ? WHERE digest = ?", now, digest)
            self._metrics.store_hits.inc()
            return Blob(digest, nbytes)
        target.parent.mkdir(exist_ok=True, mode=0o700)
        incoming.rename(target)
        if durable:
            _sync_folder(target.parent)
        self._execute("INSERT OR IGNORE INTO blobs VALUES (?, ?, ?, NULL)", digest, nbytes, now)
        self._count(nbytes)
        self._metrics.store_misses.inc()
        return Blob(digest, nbytes)

    def _remove(self, rows: list[tuple[str, int]]) -> None:
        for digest, nbytes in rows:
            # The row first: a crash in between leaves a file that the next start removes.
            self._execute("DELETE FROM blobs WHERE digest = ?", digest)
            self._path(digest).unlink(missing_ok=True)
            self._count(-nbytes)
            self._metrics.store_evicted.inc()

    def _path(self, digest: str) -> Path:
        return self._blobs / digest[:2] / digest

    def _count(self, nbytes: int) -> None:
        self._used += nbytes
        self._metrics.store_bytes.set(self._used)

    @property
    def _database(self) -> sqlite3.Connection:
        assert self._db is not None
        return self._db

    def _execute(self, sql: str, *values: Any) -> list[Any]:
        return self._database.execute(sql, values).fetchall()


class Upload:
    """A medium that is being received. Bytes count for the quota before they are written."""

    def __init__(self, store: Store, path: Path, durable: bool) -> None:
        self.nbytes = 0
        self.reserved = 0
        self._store = store
        self._path = path
        self._durable = durable
        self._hash = hashlib.sha256()
        self._file: IO[bytes] | None = None
        self._buffer = bytearray()
        self._writing: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Add bytes; 503 if there is no room for them."""
        self._store.reserve(len(data))
        self.reserved += len(data)
        self.nbytes += len(data)
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            await self._flush()

    async def commit(self) -> Blob:
        """Keep what was written; 422 if that was nothing."""
        if not self.nbytes:
            raise ApiError(422, "The medium is empty (0 bytes).", code="media_refused")
        await self._flush(last=True)
        digest = self._hash.hexdigest()
        return self._store.admit(digest, self.nbytes, self._path, durable=self._durable)

    async def discard(self) -> None:
        """Remove what is left, once a thread that still writes has finished."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    async def _flush(self, *, last: bool = False) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        self._writing = asyncio.create_task(asyncio.to_thread(self._write, data, last))
        await asyncio.shield(self._writing)

    def _write(self, data: bytes, last: bool) -> None:
        if self._file is None:
            self._file = self._path.open("xb")
        self._file.write(data)
        self._hash.update(data)
        if last:
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())
            self._file.close()


def not_found() -> ApiError:
    """404: the same for files that never were and files of others."""
    return ApiError(404, "There is no such file.", code="file_not_found")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
