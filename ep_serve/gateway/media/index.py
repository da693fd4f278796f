"""Which media a place holds, who named them, and what has to go when there is no room.

The same for a folder and for a bucket: an index never touches the media themselves. What it takes
off its list it hands back as `Gone`, for its owner to erase. SQLite keeps the lists because a
transaction is what makes a crash between the two harmless.
"""

from __future__ import annotations

import json
import math
import secrets
import sqlite3
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ep_serve.gateway.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
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
_EVICT_AT_ONCE = 64
_LAST = 1 << 63


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
    tenant: str


@dataclass(slots=True)
class Gone:
    """What has left an index: the media to erase, and the files that named them."""

    blobs: list[str] = field(default_factory=list)
    files: list[File] = field(default_factory=list)


def new_file(tenant: str, blob: Blob, name: str, purpose: str, ttl_s: float) -> File:
    """A file that is made now. Ids in alphabetical order are files from new to old."""
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
    """The media of one place, within a quota.

    Args:
        quota: bytes that may be used.
        changed: is told how many bytes are used, whenever that changes.
    """

    def __init__(self, quota: int, changed: Callable[[int], Any]) -> None:
        self.used = 0
        """Bytes of media, and those that are reserved for media to come."""
        self._stored = 0
        self._quota = quota
        self._changed = changed
        self._pins: Counter[str] = Counter()
        self._db: sqlite3.Connection | None = None

    def open(self, path: Path | None) -> None:
        """Read the index at a path, or begin one in memory."""
        self._db = sqlite3.connect(path or ":memory:", isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(_SCHEMA)
        self._stored = sum(self.blobs().values())
        self.count(self._stored)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()

    # -- media ---------------------------------------------------------------------------------

    def blobs(self) -> dict[str, int]:
        """All digests, with their bytes."""
        return dict(self._execute("SELECT digest, bytes FROM blobs"))

    def touch(self, digest: str) -> bool:
        """Note that a medium is used; False if it is not known."""
        sql = "UPDATE blobs SET used = ? WHERE digest = ? RETURNING 1"
        return bool(self._execute(sql, time.time(), digest))

    def add(self, digest: str, nbytes: int, used: float | None = None) -> None:
        """Note a medium, if it is new."""
        sql = "INSERT OR IGNORE INTO blobs VALUES (?, ?, ?, NULL) RETURNING 1"
        if self._execute(sql, digest, nbytes, time.time() if used is None else used):
            self._stored += nbytes
            self.count(nbytes)

    def forget(self, digests: Iterable[str]) -> None:
        """Take media off the list that are there no more, and their files."""
        for digest in digests:
            sql = "DELETE FROM blobs WHERE digest = ? RETURNING bytes"
            for (nbytes,) in self._execute(sql, digest):
                self._stored -= nbytes
                self.count(-nbytes)

    def forget_unnamed(self) -> None:
        """Take all media off the list that no file names."""
        self.forget(row[0] for row in self._execute(f"SELECT digest FROM blobs WHERE NOT {_NAMED}"))

    def named(self, digest: str) -> bool:
        """Whether a file names a medium."""
        return bool(self._execute("SELECT 1 FROM files WHERE digest = ? LIMIT 1", digest))

    @contextmanager
    def pinned(self, digest: str) -> Iterator[None]:
        """Let a medium stay inside the block, whatever the quota says."""
        self._pins[digest] += 1
        try:
            yield
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

    def forget_facts(self) -> None:
        self._execute("UPDATE blobs SET facts = NULL")

    # -- files ---------------------------------------------------------------------------------

    def add_file(self, file: File) -> None:
        """Note a file of a known medium, if it is new."""
        self._execute(
            "INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(file.id, file.tenant, file.number, file.digest),
            *(file.name, file.purpose, file.created, file.expires),
        )

    def remove_file(self, file_id: str) -> None:
        self._execute("DELETE FROM files WHERE id = ?", file_id)

    def file(self, tenant: str, file_id: str) -> File | None:
        """A tenant's file of this id."""
        rows = self._files("files.tenant = ? AND files.id = ?", tenant, file_id)
        return rows[0] if rows else None

    def files(self, tenant: str, before: int, limit: int) -> list[File]:
        """Up to `limit` files of a tenant, newest first, with numbers below `before`."""
        where = "files.tenant = ? AND files.number < ? ORDER BY files.number DESC LIMIT ?"
        return self._files(where, tenant, before, limit)

    def file_ids(self) -> set[str]:
        """The ids of all files of all tenants."""
        return {row[0] for row in self._execute("SELECT id FROM files")}

    # -- what has to go ------------------------------------------------------------------------

    def sweep(self, unnamed_ttl_s: float) -> Gone:
        """Take off what is too old: files past their end, and unnamed media not used for long."""
        now = time.time()
        gone = Gone(files=self._files("files.expires < ?", now))
        for file in gone.files:
            self.remove_file(file.id)
        rows = self._execute(
            f"SELECT digest FROM blobs WHERE used < ? AND NOT {_NAMED}", now - unnamed_ttl_s
        )
        self._remove((row[0] for row in rows), gone)
        return gone

    def release(self, digest: str) -> Gone:
        """Take a medium off if nobody names it or uses it."""
        gone = Gone()
        if not self.named(digest):
            self._remove([digest], gone)
        return gone

    def lacks(self, nbytes: int) -> bool:
        """Whether there is no room for so many bytes."""
        return self.used + nbytes > self._quota

    def make_room(self, nbytes: int) -> Gone:
        """Take off the media used least recently, those without a name first, and count bytes.

        Raises:
            ApiError: 503, if what is left is in use.
        """
        held = self._execute(
            f"SELECT SUM(bytes) FROM blobs WHERE digest IN ({','.join('?' * len(self._pins))})",
            *self._pins,
        )
        if self.lacks(nbytes - self._stored + (held[0][0] or 0)):
            raise ApiError(503, "There is no room for media.", code="storage_full", retry_after=10)
        gone = Gone()
        while self.lacks(nbytes):
            rows = self._execute(
                f"SELECT digest FROM blobs ORDER BY {_NAMED}, used LIMIT ?",
                _EVICT_AT_ONCE + len(self._pins),
            )
            for (digest,) in rows:
                if self.lacks(nbytes):
                    self._remove([digest], gone)
        self.count(nbytes)
        return gone

    def count(self, nbytes: int) -> None:
        """Add to the bytes that are used."""
        self.used += nbytes
        self._changed(self.used)

    def _remove(self, digests: Iterable[str], gone: Gone) -> None:
        free = [digest for digest in digests if not self._pins[digest]]
        for digest in free:
            gone.files += self._files("files.digest = ?", digest)
        gone.blobs += free
        self.forget(free)

    def _files(self, where: str, *values: Any) -> list[File]:
        sql = f"SELECT {_FILE} FROM files JOIN blobs USING (digest) WHERE {where}"
        return [File(*row) for row in self._execute(sql, *values)]

    def _execute(self, sql: str, *values: Any) -> list[Any]:
        assert self._db is not None
        return self._db.execute(sql, values).fetchall()
