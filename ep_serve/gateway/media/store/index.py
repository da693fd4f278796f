"""Which media a place holds, who named them, and what has to go when there is no room.

The same for a folder and for a bucket: an index never touches the media themselves, it tells its
owner which to erase. SQLite keeps the lists, so that they survive a crash; media without a row and
rows without a medium are removed at the next start.
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
"""Files of one tenant; with more, its oldest give way. A row takes a kilobyte, however small the
medium is, and files may all name the same one."""
MAX_UNNAMED = 100_000
"""Media without a file. Each takes a row, an inode and a block, however small it is."""


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
    """The media of one place, within a quota. One thread at a time may call it.

    Args:
        quota: bytes that may be stored.
        in_use: the media that have to stay, whatever the quota says.
        erase: is told which files and which medium are about to leave the index.
        changed: is told how many bytes are used, whenever that changes.
    """

    def __init__(
        self,
        quota: int,
        in_use: Container[str],
        erase: Callable[[Sequence[File], str | None], None],
        changed: Callable[[int], Any],
    ) -> None:
        self.quota = quota
        self.named_bytes = 0
        """Bytes of media that files name."""
        self.reserved = 0
        """Bytes of media to come."""
        self._stored = 0
        self._reserving = Lock()
        self._unnamed: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._tenants: Counter[str] = Counter()  # bytes of each one's files
        self._in_use = in_use
        self._erase = erase
        self._changed = changed
        self._db: sqlite3.Connection | None = None

    @property
    def used(self) -> int:
        """Bytes of media, and those that are reserved for media to come."""
        return self._stored + self.reserved

    def open(self, path: Path | None) -> None:
        """Read the index at a path, or begin one in memory."""
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
        self._changed(self.used)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()

    def reserve(self, nbytes: int) -> None:
        """Count bytes of media to come; negative ones when they came, or will not. Any thread."""
        with self._reserving:
            self.reserved += nbytes
        self._changed(self.used)

    # -- media ---------------------------------------------------------------------------------

    def blobs(self) -> dict[str, int]:
        """All digests, with their bytes."""
        return dict(self._execute("SELECT digest, bytes FROM blobs"))

    def size(self, digest: str) -> int | None:
        """Bytes of a medium, if it is known."""
        rows = self._execute("SELECT bytes FROM blobs WHERE digest = ?", digest)
        return rows[0][0] if rows else None

    def touch(self, digest: str) -> None:
        """Note that a medium is used."""
        self._execute("UPDATE blobs SET used = ? WHERE digest = ?", time.time(), digest)
        if digest in self._unnamed:
            self._unnamed.move_to_end(digest)

    def add(self, digest: str, nbytes: int, used: float | None = None) -> None:
        """Note a medium, if it is new."""
        sql = "INSERT OR IGNORE INTO blobs VALUES (?, ?, ?, NULL) RETURNING 1"
        if self._execute(sql, digest, nbytes, time.time() if used is None else used):
            self._stored += nbytes
            self._unnamed[digest] = nbytes
            self._changed(self.used)

    def forget(self, digests: Iterable[str], *, erase: bool = True) -> None:
        """Take media and their files off the list; they are erased first, if they are there."""
        for digest in digests:
            files = self._files("files.digest = ?", digest)
            if erase:
                self._erase(files, digest)
            # Rows go last: removing them takes room on a disk that may be full.
            rows = self._execute("DELETE FROM blobs WHERE digest = ? RETURNING bytes", digest)
            for file in files:
                self._tenants[file.tenant] -= file.nbytes
            for (nbytes,) in rows:
                self._stored -= nbytes
                if self._unnamed.pop(digest, None) is None:
                    self.named_bytes -= nbytes
            self._changed(self.used)

    def forget_unnamed(self) -> None:
        """Take all media off the list that no file names."""
        self.forget(list(self._unnamed))

    def named(self, digest: str) -> bool:
        """Whether a file names a medium."""
        return bool(self._execute("SELECT 1 FROM files WHERE digest = ? LIMIT 1", digest))

    def facts(self, digest: str) -> dict[str, Any] | None:
        """What probing said about a medium."""
        rows = self._execute("SELECT facts FROM blobs WHERE digest = ?", digest)
        return json.loads(rows[0][0]) if rows and rows[0][0] else None

    def remember_facts(self, digest: str, facts: dict[str, Any]) -> None:
        self._execute("UPDATE blobs SET facts = ? WHERE digest = ?", json.dumps(facts), digest)

    def forget_facts(self) -> None:
        self._execute("UPDATE blobs SET facts = NULL WHERE facts IS NOT NULL")

    # -- files ---------------------------------------------------------------------------------

    def add_file(self, file: File) -> None:
        """Note a file of a known medium, if it is new."""
        rows = self._execute(
            "INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING 1",
            *(file.id, file.tenant, file.number, file.digest),
            *(file.name, file.purpose, file.created, file.expires),
        )
        if rows:
            self._tenants[file.tenant] += file.nbytes
            self.named_bytes += self._unnamed.pop(file.digest, 0)

    def remove_file(self, file_id: str) -> None:
        """Forget a file; its medium stays."""
        for file in self._files("files.id = ?", file_id):
            self._execute("DELETE FROM files WHERE id = ?", file_id)
            self._tenants[file.tenant] -= file.nbytes
            if not self.named(file.digest):
                self._unnamed[file.digest] = file.nbytes
                self.named_bytes -= file.nbytes

    def file(self, tenant: str, file_id: str) -> File | None:
        """A tenant's file of this id, if it has not expired."""
        where = "files.tenant = ? AND files.id = ? AND files.expires > ?"
        rows = self._files(where, tenant, file_id, time.time())
        return rows[0] if rows else None

    def files(self, tenant: str, before: int, limit: int) -> list[File]:
        """Up to `limit` files of a tenant, newest first, with numbers below `before`."""
        where = (
            "files.tenant = ? AND files.number < ? AND files.expires > ? "
            "ORDER BY files.number DESC LIMIT ?"
        )
        return self._files(where, tenant, before, time.time(), limit)

    def file_ids(self) -> set[str]:
        """The ids of all files of all tenants."""
        return {row[0] for row in self._execute("SELECT id FROM files")}

    # -- what has to go ------------------------------------------------------------------------

    def sweep(self, unnamed_ttl_s: float) -> None:
        """Take off what is too old: files past their end, and unnamed media not used for long."""
        before = time.time() - unnamed_ttl_s
        self._sweep_unnamed(before)  # first: this works on a full disk
        for file in self._files("files.expires <= ?", time.time()):
            self._erase([file], None)
            self.remove_file(file.id)
        self._sweep_unnamed(before)

    def _sweep_unnamed(self, before: float) -> None:
        rows = self._execute(f"SELECT digest FROM blobs WHERE used < ? AND NOT {_NAMED}", before)
        self.forget(digest for (digest,) in rows if digest not in self._in_use)

    def drop_file(self, file: File) -> None:
        """Take a file off, and its medium if nobody else names it or uses it."""
        if file.digest in self._in_use or len(self._files("files.digest = ?", file.digest)) > 1:
            self._erase([file], None)
            self.remove_file(file.id)
        else:
            self.forget([file.digest])

    def release(self, digest: str) -> None:
        """Take a medium off if nobody names it or uses it."""
        if digest in self._unnamed and digest not in self._in_use:
            self.forget([digest])

    @property
    def unnamed_bytes(self) -> int:
        """Bytes of media that no file names."""
        return self._stored - self.named_bytes

    def drop_unnamed(self, nbytes: int) -> None:
        """Take off unnamed media until `nbytes` more fit and there are not too many, or until
        those in use are left.
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
        self.forget(chosen)

    def drop_files(self, tenant: str, nbytes: int, beside: int = 0) -> None:
        """Take off files until `nbytes` more of a tenant's fit, and what others bring `beside`.

        The tenant with the most bytes gives way, with the files that it used least recently. So
        nobody loses files to a tenant that has more. A tenant with `MAX_FILES` loses its oldest.

        Raises:
            ApiError: 503, if what is left is in use or belongs to tenants that have less. Then
                nothing is taken off.
        """
        missing = self.named_bytes + beside + nbytes - self.quota
        held = self._tenants.copy()
        held[tenant] += nbytes
        oldest: dict[str, Iterator[File]] = {}
        chosen: list[File] = []
        names: dict[str, int] = {}  # that a medium has left
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
            left = names.get(file.digest) or len(self._files("files.digest = ?", file.digest))
            names[file.digest] = left - 1
            if left == 1:
                missing -= file.nbytes
        for file in chosen:
            self.drop_file(file)
        newest_first = "files.tenant = ? ORDER BY files.number DESC LIMIT -1 OFFSET ?"
        for file in self._files(newest_first, tenant, MAX_FILES - 1):
            self.drop_file(file)

    def _oldest(self, tenant: str) -> Iterator[File]:
        """The files of a tenant that are not in use, the one used least recently first."""
        files = self._files("files.tenant = ? ORDER BY used", tenant)
        return (file for file in files if file.digest not in self._in_use)

    def _files(self, where: str, *values: Any) -> list[File]:
        sql = f"SELECT {_FILE} FROM files JOIN blobs USING (digest) WHERE {where}"
        return [File(*row) for row in self._execute(sql, *values)]

    def _execute(self, sql: str, *values: Any) -> list[Any]:
        assert self._db is not None
        return self._db.execute(sql, values).fetchall()


def storage_full() -> ApiError:
    """503: no room for now."""
    return ApiError(503, "There is no room for media.", code="storage_full", retry_after=10)
