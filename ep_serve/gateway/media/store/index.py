"""The index of stored media and files, with quotas and eviction.

It is used for a directory and for a bucket: a callback deletes the media themselves. The index is
an SQLite database and survives a crash; media without a row and rows without a medium are removed
at the next start.
"""

from __future__ import annotations

import json
import math
import secrets
import sqlite3
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from ep_serve.gateway.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence
    from pathlib import Path

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
_NAMED = "EXISTS (SELECT 1 FROM files WHERE files.digest = blobs.digest)"
_FILE = "files.id, digest, bytes, name, purpose, created, expires, number, tenant"
_LAST = 1 << 63
MAX_FILES = 10_000
"""Files of one tenant; above that its oldest are evicted. A row takes a kilobyte, however small the
medium is, and files may share a medium."""
MAX_UNNAMED = 100_000
"""Media without a file. Each takes a row, an inode and a block."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored medium."""

    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class File:
    """An uploaded file of a tenant."""

    id: str
    digest: str
    nbytes: int
    name: str
    purpose: str
    created: int
    expires: int
    number: int
    tenant: str


def new_file(tenant: str, blob: Blob, name: str, purpose: str, ttl_s: float) -> File:
    """Create file metadata. Ids sort alphabetically from new to old files."""
    now, number = time.time(), time.time_ns()
    return File(
        id=f"file-{_LAST - number:016x}{secrets.token_urlsafe(18)}",
        digest=blob.digest,
        nbytes=blob.nbytes,
        name=name,
        purpose=purpose,
        created=int(now),
        expires=math.ceil(now + ttl_s),
        number=number,
        tenant=tenant,
    )


class Index:
    """The media of one location, within a quota. Not thread-safe, except `reserve`.

    Args:
        quota: limit of stored bytes.
        in_use: pinned media, which are never evicted.
        erase: called with files and a medium before they are removed from the index.
        on_change: called with the used bytes when they change.
    """

    def __init__(
        self,
        quota: int,
        in_use: Container[str],
        erase: Callable[[Sequence[File], str | None], None],
        on_change: Callable[[int], Any],
    ) -> None:
        self.quota = quota
        self.named_bytes = 0
        """Bytes of media with files."""
        self.reserved = 0
        """Reserved bytes of incoming media."""
        self._stored = 0
        self._reserving = Lock()
        self._unnamed: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._tenants: Counter[str] = Counter()  # bytes of files by tenant
        self._in_use = in_use
        self._erase = erase
        self._on_change = on_change
        self._db: sqlite3.Connection | None = None

    @property
    def used(self) -> int:
        """Stored and reserved bytes."""
        return self._stored + self.reserved

    def open(self, path: Path | None) -> None:
        """Open the database at a path, or in memory."""
        self._db = sqlite3.connect(
            path or ":memory:", isolation_level=None, check_same_thread=False
        )
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(_SCHEMA)
        rows = self._execute(f"SELECT digest, bytes, {_NAMED} FROM blobs ORDER BY used")
        self._stored = sum(nbytes for _, nbytes, _ in rows)
        self.named_bytes = sum(nbytes for _, nbytes, named in rows if named)
        self._unnamed = OrderedDict((name, nbytes) for name, nbytes, named in rows if not named)
        sql = "SELECT tenant, SUM(bytes) FROM files JOIN blobs USING (digest) GROUP BY tenant"
        self._tenants = Counter(dict(self._execute(sql)))
        self._on_change(self.used)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()

    def reserve(self, nbytes: int) -> None:
        """Reserve bytes for incoming media, or release them if negative. Thread-safe."""
        with self._reserving:
            self.reserved += nbytes
        self._on_change(self.used)

    # -- media ---------------------------------------------------------------------------------

    def blobs(self) -> dict[str, int]:
        """Return the bytes of all media by digest."""
        return dict(self._execute("SELECT digest, bytes FROM blobs"))

    def size(self, digest: str) -> int | None:
        """Return the bytes of a medium, or None."""
        rows = self._execute("SELECT bytes FROM blobs WHERE digest = ?", digest)
        return rows[0][0] if rows else None

    def touch(self, digest: str) -> None:
        """Update the time of last use of a medium."""
        self._execute("UPDATE blobs SET used = ? WHERE digest = ?", time.time(), digest)
        if digest in self._unnamed:
            self._unnamed.move_to_end(digest)

    def add(self, digest: str, nbytes: int, used: float | None = None) -> None:
        """Add a medium, if it is new."""
        sql = "INSERT OR IGNORE INTO blobs VALUES (?, ?, ?, NULL) RETURNING 1"
        if self._execute(sql, digest, nbytes, time.time() if used is None else used):
            self._stored += nbytes
            self._unnamed[digest] = nbytes
            self._on_change(self.used)

    def remove(self, digests: Iterable[str], *, erase: bool = True) -> None:
        """Remove media and their files, which are erased first by default."""
        for digest in digests:
            files = self._files("files.digest = ?", digest)
            if erase:
                self._erase(files, digest)
            # Rows are deleted last: that needs space on a disk that may be full.
            rows = self._execute("DELETE FROM blobs WHERE digest = ? RETURNING bytes", digest)
            for file in files:
                self._tenants[file.tenant] -= file.nbytes
            for (nbytes,) in rows:
                self._stored -= nbytes
                if self._unnamed.pop(digest, None) is None:
                    self.named_bytes -= nbytes
            self._on_change(self.used)

    def remove_unnamed(self) -> None:
        """Remove all media without a file."""
        self.remove(list(self._unnamed))

    def is_named(self, digest: str) -> bool:
        """Return whether a medium has a file."""
        return bool(self._execute("SELECT 1 FROM files WHERE digest = ? LIMIT 1", digest))

    def facts(self, digest: str) -> dict[str, Any] | None:
        """Return the probed properties of a medium, or None."""
        rows = self._execute("SELECT facts FROM blobs WHERE digest = ?", digest)
        return json.loads(rows[0][0]) if rows and rows[0][0] else None

    def save_facts(self, digest: str, facts: dict[str, Any]) -> None:
        self._execute("UPDATE blobs SET facts = ? WHERE digest = ?", json.dumps(facts), digest)

    def clear_facts(self) -> None:
        self._execute("UPDATE blobs SET facts = NULL WHERE facts IS NOT NULL")

    # -- files ---------------------------------------------------------------------------------

    def add_file(self, file: File) -> None:
        """Add a file of an indexed medium, if it is new."""
        rows = self._execute(
            "INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING 1",
            *(file.id, file.tenant, file.number, file.digest),
            *(file.name, file.purpose, file.created, file.expires),
        )
        if rows:
            self._tenants[file.tenant] += file.nbytes
            self.named_bytes += self._unnamed.pop(file.digest, 0)

    def remove_file(self, file_id: str) -> None:
        """Remove a file but not its medium."""
        for file in self._files("files.id = ?", file_id):
            self._execute("DELETE FROM files WHERE id = ?", file_id)
            self._tenants[file.tenant] -= file.nbytes
            if not self.is_named(file.digest):
                self._unnamed[file.digest] = file.nbytes
                self.named_bytes -= file.nbytes

    def file(self, tenant: str, file_id: str) -> File | None:
        """Return a tenant's file, or None if it is missing or expired."""
        where = "files.tenant = ? AND files.id = ? AND files.expires > ?"
        rows = self._files(where, tenant, file_id, time.time())
        return rows[0] if rows else None

    def files(self, tenant: str, before: int, limit: int) -> list[File]:
        """Return up to `limit` files of a tenant, newest first, with numbers below `before`."""
        where = (
            "files.tenant = ? AND files.number < ? AND files.expires > ? "
            "ORDER BY files.number DESC LIMIT ?"
        )
        return self._files(where, tenant, before, time.time(), limit)

    def file_ids(self) -> set[str]:
        """Return the ids of all files of all tenants."""
        return {row[0] for row in self._execute("SELECT id FROM files")}

    # -- eviction ------------------------------------------------------------------------------

    def sweep(self, unnamed_ttl_s: float) -> None:
        """Remove expired files, and media without files that were not used for the given time."""
        before = time.time() - unnamed_ttl_s
        self._sweep_unnamed(before)  # first, because this works on a full disk
        for file in self._files("files.expires <= ?", time.time()):
            self._erase([file], None)
            self.remove_file(file.id)
        self._sweep_unnamed(before)

    def _sweep_unnamed(self, before: float) -> None:
        rows = self._execute(f"SELECT digest FROM blobs WHERE used < ? AND NOT {_NAMED}", before)
        self.remove(digest for (digest,) in rows if digest not in self._in_use)

    def delete_file(self, file: File) -> None:
        """Remove a file, and its medium if it has no other files and is not pinned."""
        if file.digest in self._in_use or len(self._files("files.digest = ?", file.digest)) > 1:
            self._erase([file], None)
            self.remove_file(file.id)
        else:
            self.remove([file.digest])

    def remove_if_unused(self, digest: str) -> None:
        """Remove a medium that has no files and is not pinned."""
        if digest in self._unnamed and digest not in self._in_use:
            self.remove([digest])

    @property
    def unnamed_bytes(self) -> int:
        """Bytes of media without files."""
        return self._stored - self.named_bytes

    def evict_unnamed(self, nbytes: int) -> None:
        """Evict unpinned media without files until `nbytes` more fit and their number is
        within `MAX_UNNAMED`.
        """
        excess = self.used + nbytes - self.quota
        too_many = len(self._unnamed) - MAX_UNNAMED
        chosen: list[str] = []
        for digest, size in self._unnamed.items():
            if excess <= 0 and len(chosen) >= too_many:
                break
            if digest not in self._in_use:
                chosen.append(digest)
                excess -= size
        self.remove(chosen)

    def evict_files(self, tenant: str, nbytes: int, concurrent: int = 0) -> None:
        """Evict files until `nbytes` of a tenant and `concurrent` bytes of other uploads fit.

        The least recently used files of the tenant with the most bytes are evicted, so that no
        tenant loses files to one that has more. A tenant with `MAX_FILES` loses its oldest.

        Raises:
            ApiError: 503 if the remaining files are pinned or belong to tenants with fewer bytes;
                then nothing is evicted.
        """
        missing = self.named_bytes + concurrent + nbytes - self.quota
        held = self._tenants.copy()
        held[tenant] += nbytes
        oldest: dict[str, Iterator[File]] = {}
        chosen: list[File] = []
        remaining: dict[str, int] = {}  # files of a medium
        while missing > 0:
            file = None
            for owner, size in held.most_common():
                if size > held[tenant] or owner == tenant:
                    file = next(oldest.setdefault(owner, self._oldest(owner)), None)
                if file is not None:
                    break
            if file is None:
                raise storage_full()
            chosen.append(file)
            held[file.tenant] -= file.nbytes
            left = remaining.get(file.digest) or len(self._files("files.digest = ?", file.digest))
            remaining[file.digest] = left - 1
            if left == 1:
                missing -= file.nbytes
        for file in chosen:
            self.delete_file(file)
        newest_first = "files.tenant = ? ORDER BY files.number DESC LIMIT -1 OFFSET ?"
        for file in self._files(newest_first, tenant, MAX_FILES - 1):
            self.delete_file(file)

    def _oldest(self, tenant: str) -> Iterator[File]:
        """Yield the unpinned files of a tenant, least recently used first."""
        files = self._files("files.tenant = ? ORDER BY used", tenant)
        return (file for file in files if file.digest not in self._in_use)

    def _files(self, where: str, *values: Any) -> list[File]:
        sql = f"SELECT {_FILE} FROM files JOIN blobs USING (digest) WHERE {where}"
        return [File(*row) for row in self._execute(sql, *values)]

    def _execute(self, sql: str, *values: Any) -> list[Any]:
        assert self._db is not None
        return self._db.execute(sql, values).fetchall()


def storage_full() -> ApiError:
    """503 for a full store."""
    return ApiError(503, "The media store is full.", code="storage_full", retry_after=10)
