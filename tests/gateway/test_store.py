"""The store: once each, within the quota, for a time, whatever happens to the process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.index import Blob
from ep_serve.gateway.media.store import Store
from ep_serve.gateway.metrics import Metrics
from ep_serve.gateway.settings import SettingsError, StoreSettings

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[2]


async def opened(path: Path, **settings: Any) -> Store:
    store = Store(StoreSettings(path=path, **settings), Metrics())
    await store.open()
    return store


async def put(store: Store, data: bytes, *, tenant: str | None = None) -> Blob:
    async with store.receive() as upload:
        await upload.write(data)
        blob = await upload.commit()
    if tenant:
        await store.add_file(tenant, blob, "name", "vision")
    return blob


def on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "blobs").glob("*/*"))


async def test_the_same_content_is_stored_once(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    first = await put(store, b"a" * 1000)
    assert await put(store, b"a" * 1000) == first
    assert store.used_bytes == on_disk(tmp_path) == 1000


async def test_uploads_stay_within_the_quota(tmp_path: Path) -> None:
    store = await opened(tmp_path, quota_bytes=50_000)
    for number in range(200):
        await put(store, number.to_bytes(4, "big") * 500, tenant="t")
        assert store.used_bytes == on_disk(tmp_path) <= 50_000
    kept = await store.files("t", None, 1_000)
    assert len(kept) == 25
    assert {file.digest for file in kept} == {p.name for p in (tmp_path / "blobs").glob("*/*")}


async def test_many_uploads_at_once_stay_within_the_quota(tmp_path: Path) -> None:
    store = await opened(tmp_path, quota_bytes=5 << 20)

    async def one(number: int) -> None:
        await put(store, number.to_bytes(4, "big") * (1 << 16), tenant="t")

    for start in range(0, 120, 12):
        await asyncio.gather(*(one(number) for number in range(start, start + 12)))
        assert store.used_bytes == on_disk(tmp_path) <= 5 << 20
    assert len(await store.files("t", None, 1_000)) == 20


async def test_what_nobody_named_goes_before_files(tmp_path: Path) -> None:
    store = await opened(tmp_path, quota_bytes=3_000)
    await put(store, b"f" * 1000, tenant="t")
    await put(store, b"a" * 1000)
    await put(store, b"b" * 1000)
    await put(store, b"c" * 1000)
    assert len(await store.files("t", None, 10)) == 1


async def test_what_is_in_use_is_not_removed(tmp_path: Path) -> None:
    store = await opened(tmp_path, quota_bytes=2_000)
    blob = await put(store, b"a" * 1000)
    async with store.pinned(blob.digest) as path:
        for number in range(5):
            await put(store, bytes([number]) * 900)
        assert path.read_bytes() == b"a" * 1000
        with pytest.raises(ApiError) as error:
            await put(store, b"x" * 1500)
        assert error.value.status == 503
        assert error.value.retry_after
    await put(store, b"x" * 1500)


async def test_media_of_requests_and_files_grow_old(tmp_path: Path) -> None:
    store = await opened(tmp_path, media_ttl_s=0.05, file_ttl_s=1)
    await put(store, b"a" * 10)
    await put(store, b"f" * 10, tenant="t")
    time.sleep(0.08)
    await store.sweep()
    assert store.used_bytes == 10
    time.sleep(2)
    await store.sweep()
    assert store.used_bytes == on_disk(tmp_path) == 0
    assert await store.files("t", None, 10) == []


async def test_one_content_with_two_names_stays_until_both_are_gone(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await put(store, b"a", tenant="t")
    await put(store, b"a", tenant="u")
    await store.delete_file("t", (await store.files("t", None, 1))[0].id)
    assert store.used_bytes == 1
    await store.delete_file("u", (await store.files("u", None, 1))[0].id)
    assert store.used_bytes == 0


async def test_nothing_of_an_unfinished_upload_stays(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    with suppress(RuntimeError):
        async with store.receive() as upload:
            await upload.write(b"a" * (3 << 20))
            raise RuntimeError
    assert store.used_bytes == 0
    assert not list((tmp_path / "incoming").iterdir())


async def test_an_empty_medium_is_refused(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    with pytest.raises(ApiError, match="empty"):
        async with store.receive() as upload:
            await upload.commit()


async def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    (tmp_path / "incoming" / "half").write_bytes(b"half")
    with pytest.raises(SettingsError, match="another process"):
        await opened(tmp_path)
    assert list((tmp_path / "incoming").iterdir())  # of the first one, and left alone
    await store.close()
    await (await opened(tmp_path)).close()


async def test_what_a_crash_leaves_is_repaired(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    kept = await put(store, b"kept", tenant="t")
    lost = await put(store, b"lost", tenant="t")
    short = await put(store, b"short", tenant="t")
    await store.close()
    (tmp_path / "blobs" / lost.digest[:2] / lost.digest).unlink()
    (tmp_path / "blobs" / short.digest[:2] / short.digest).write_bytes(b"s")
    (tmp_path / "blobs" / kept.digest[:2] / ("0" * 64)).write_bytes(b"no row")
    (tmp_path / "incoming" / "half").write_bytes(b"half")
    store = await opened(tmp_path)
    assert store.used_bytes == on_disk(tmp_path) == 4
    assert [file.digest for file in await store.files("t", None, 10)] == [kept.digest]
    assert not list((tmp_path / "incoming").iterdir())


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.gateway.test_store import opened, put
async def main():
    store = await opened(Path(sys.argv[1]), quota_bytes=20 << 20)
    async def writer(number):
        count = 0
        while True:
            await put(store, f"{number}-{count}".encode() * 100_000, tenant="t")
            count += 1
            print("x", flush=True)
    await asyncio.gather(*(writer(number) for number in range(6)))
asyncio.run(main())
"""


@pytest.mark.parametrize("after", [3, 40])
async def test_a_process_killed_in_the_middle_leaves_a_store_that_works(
    tmp_path: Path, after: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for _ in range(after):
            assert process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    store = await opened(tmp_path, quota_bytes=20 << 20)
    files = await store.files("t", None, 1_000)
    assert files
    assert store.used_bytes == on_disk(tmp_path) <= 20 << 20
    assert {file.digest for file in files} == {p.name for p in (tmp_path / "blobs").glob("*/*")}
    for file in files:
        async with store.pinned(file.digest) as path:
            assert path.stat().st_size == file.nbytes
    await put(store, b"new", tenant="t")
