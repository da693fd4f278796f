"""The media store with a full disk, a broken index and after crashes."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.store.index import Blob
from ep_serve.gateway.media.store.local import Store
from ep_serve.gateway.settings import SettingsError
from tests.gateway.stores import on_disk, opened, put

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[2]


# -- a disk that is full ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "ep-serve-test", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


KEPT = b"k" * 100_000


async def is_full(store: Store, number: int) -> None:
    with pytest.raises(ApiError) as error:
        await put(store, bytes([number]) * (8 << 20), tenant="t")
    assert (error.value.status, error.value.code) == (507, "disk_full")


async def still_works(store: Store, kept: Blob) -> None:
    """What needs no room."""
    async with store.pinned(kept.digest) as path:
        assert path.read_bytes() == KEPT
    (file,) = await store.files("t", None, 10)
    assert await store.file("t", file.id) == file
    await store.save_facts(kept.digest, {"a": 1})
    assert await store.facts(kept.digest) in ({"a": 1}, None)
    assert store.used_bytes == len(KEPT)


async def test_a_full_disk_refuses_uploads_and_nothing_else(small_disk: Path) -> None:
    store = await opened(small_disk)
    kept = await put(store, KEPT, tenant="t")
    for number in range(3):
        await is_full(store, number)
        assert not list((small_disk / "incoming").iterdir())
    with suppress(OSError), (small_disk / "of somebody else").open("wb", buffering=0) as file:
        while file.write(bytes(1_000)):
            pass
    await is_full(store, 3)
    await still_works(store, kept)
    await store.delete_file("t", (await store.files("t", None, 1))[0].id)
    assert store.used_bytes == on_disk(small_disk) == 0
    (small_disk / "of somebody else").unlink()
    await put(store, b"again" * 1_000, tenant="t")
    await store.close()


async def test_a_limit_on_the_size_of_files_counts_as_a_full_disk(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    kept = await put(store, KEPT, tenant="t")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, limits[1]))
    try:
        await is_full(store, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    await still_works(store, kept)
    assert not list((tmp_path / "incoming").iterdir())


@pytest.mark.parametrize("named", [False, True])
async def test_an_index_that_is_full_refuses_uploads_and_nothing_else(
    tmp_path: Path, named: bool
) -> None:
    store = await opened(tmp_path)
    kept = await put(store, b"k" * 1_000, tenant="t")
    ((pages,),) = store._index._execute("PRAGMA page_count")
    store._index._execute(f"PRAGMA max_page_count = {pages}")

    async def fill() -> None:
        for number in range(10_000):
            await put(store, number.to_bytes(4, "big"), tenant="u" * 1_000 if named else None)

    with pytest.raises(ApiError) as error:
        await fill()
    assert (error.value.status, error.value.code) == (507, "disk_full")
    assert not list((tmp_path / "incoming").iterdir())
    assert store.used_bytes == on_disk(tmp_path)
    async with store.pinned(kept.digest) as path:
        assert path.read_bytes() == b"k" * 1_000
    await store.delete_file("t", (await store.files("t", None, 1))[0].id)
    assert store.used_bytes == on_disk(tmp_path)


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
