"""The media store: deduplication, quotas, eviction and expiry."""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.store import index
from ep_serve.gateway.media.store.index import Index
from ep_serve.gateway.settings import SettingsError
from tests.gateway.stores import on_disk, opened, put

pytestmark = pytest.mark.anyio


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


async def test_media_without_files_are_evicted_before_files(tmp_path: Path) -> None:
    store = await opened(tmp_path, quota_bytes=3_000)
    await put(store, b"f" * 1000, tenant="t")
    await put(store, b"a" * 1000)
    await put(store, b"b" * 1000)
    await put(store, b"c" * 1000)
    assert len(await store.files("t", None, 10)) == 1


async def test_what_turns_out_to_be_no_medium_removes_no_file(tmp_path: Path) -> None:
    store = await opened(tmp_path, quota_bytes=3_000)
    for number in range(3):
        await put(store, bytes([number]) * 1_000, tenant="t")
    for _ in range(3):
        async with store.receive("u") as upload:
            await upload.write(b"x" * 2_000)
            await upload.commit()
            upload.refused = True
    assert len(await store.files("t", None, 10)) == 3
    assert store.used_bytes == on_disk(tmp_path) == 3_000


async def test_media_of_requests_remove_no_file(tmp_path: Path) -> None:
    store = await opened(tmp_path, quota_bytes=3_000)
    for number in range(3):
        await put(store, bytes([number]) * 1_000, tenant="t")
    async with store.receive("u") as upload:
        await upload.write(b"x" * 2_000)
        blob = await upload.commit()
        assert (await store.facts(blob.digest)) is None  # it is there
        assert len(await store.files("t", None, 10)) == 3
    await store.sweep()
    assert store.used_bytes == on_disk(tmp_path) == 3_000


async def test_files_of_the_tenant_with_the_most_bytes_are_evicted(tmp_path: Path) -> None:
    store = await opened(tmp_path, quota_bytes=6_000)

    async def names(tenant: str) -> int:
        return len(await store.files(tenant, None, 99))

    for number in range(6):
        await put(store, b"a" + bytes([number]) * 999, tenant="a")
    for number in range(9):
        await put(store, b"b" + bytes([number]) * 999, tenant="b")
    assert (await names("a"), await names("b")) == (3, 3)
    await put(store, b"c" * 1_000, tenant="c")
    for number in range(9):
        await put(store, b"A" + bytes([number]) * 999, tenant="a")
    assert await names("c") == 1
    assert await names("a") + await names("b") == 5
    assert store.used_bytes == on_disk(tmp_path) == 6_000


async def test_the_oldest_files_of_a_tenant_above_the_limit_are_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_FILES", 10)
    store = await opened(tmp_path)
    await put(store, b"other", tenant="other")
    for number in range(25):
        blob = await put(store, b"the same", tenant="t")
        await store.add_file("t", blob, f"{number}", "vision")
    names = [file.name for file in await store.files("t", None, 1_000)]
    assert len(names) == 10
    assert names[0] == "24"
    assert len(await store.files("other", None, 1_000)) == 1


async def test_the_number_of_media_without_a_file_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_UNNAMED", 10)
    store = await opened(tmp_path)
    named = await put(store, b"named", tenant="t")
    async with store.receive() as upload:
        await upload.write(b"in use")
        used = await upload.commit()
        blobs = [await put(store, b"%d" % number) for number in range(30)]
        there = [store.path(blob.digest).exists() for blob in blobs]
        assert sum(there) <= 10
        assert there[-1]
        assert store.path(used.digest).exists()
    assert store.path(named.digest).exists()


async def test_a_file_that_cannot_get_room_removes_nothing(tmp_path: Path) -> None:
    store = await opened(tmp_path, quota_bytes=3_000)
    small = await put(store, b"s" * 1_000, tenant="small")
    for number in range(2):
        await put(store, bytes([number]) * 1_000, tenant="large")
    async with store.pinned(small.digest):
        with pytest.raises(ApiError) as error:
            await put(store, b"x" * 2_500, tenant="large")
    assert error.value.code == "storage_full"
    assert len(await store.files("large", None, 10)) == 2
    assert store.used_bytes == on_disk(tmp_path) == 3_000


async def test_one_content_with_names_of_two_tenants_outlives_the_larger_one(
    tmp_path: Path,
) -> None:
    store = await opened(tmp_path, quota_bytes=3_000)
    for tenant in ("large", "small"):
        await put(store, b"=" * 1_000, tenant=tenant)
    await put(store, b"l" * 1_000, tenant="large")
    for number in range(2):
        await put(store, bytes([number]) * 1_000, tenant="other")
    assert len(await store.files("small", None, 10)) == 1
    assert store.used_bytes == on_disk(tmp_path) == 3_000


async def test_media_of_a_tenant_that_grow_side_by_side_are_not_all_refused(tmp_path: Path) -> None:
    store = await opened(tmp_path, quota_bytes=400_000)
    async with AsyncExitStack() as stack:
        uploads = [await stack.enter_async_context(store.receive("a")) for _ in range(9)]
        refused: dict[int, int] = {}
        for _ in range(4):
            for number, upload in enumerate(uploads):
                if number not in refused:
                    try:
                        await upload.write(b"a" * 10_000)
                    except ApiError as error:
                        refused[number] = error.status
        assert set(refused.values()) == {429}
        assert 0 not in refused
        await uploads[0].commit()


async def test_a_tenant_takes_no_more_room_for_media_in_use_than_it_leaves(
    tmp_path: Path,
) -> None:
    store = await opened(tmp_path, quota_bytes=10_000)
    async with AsyncExitStack() as stack:

        async def use(tenant: str, number: int) -> None:
            upload = await stack.enter_async_context(store.receive(tenant))
            await upload.write(tenant.encode() + bytes([number]) * 999)
            await upload.commit()

        for number in range(5):
            await use("a", number)
        with pytest.raises(ApiError) as error:
            await use("a", 5)
        assert error.value.status == 429
        await use("b", 0)
        await use("c", 0)
    async with store.receive("a") as upload:
        await upload.write(b"x" * 10_000)  # one medium may take it all


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


async def test_media_of_requests_and_files_expire(tmp_path: Path) -> None:
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


async def test_a_file_that_has_expired_is_not_served_before_it_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(tmp_path, file_ttl_s=60, media_ttl_s=1)
    await put(store, b"f" * 10, tenant="t")
    (file,) = await store.files("t", None, 10)
    monkeypatch.setattr(time, "time", lambda: float(file.expires))
    assert await store.files("t", None, 10) == []
    for ask in (store.file("t", file.id), store.files("t", file.id, 10)):
        with pytest.raises(ApiError) as error:
            await ask
        assert error.value.status == 404
    await store.sweep()
    assert store.used_bytes == on_disk(tmp_path) == 0


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


async def cancelled_twice(work: asyncio.Task[Any], first: asyncio.Event) -> None:
    """Cancel a task when an event says so, and again while it cleans up."""
    await first.wait()
    for _ in range(3):
        work.cancel()
        await asyncio.sleep(0)
    with suppress(asyncio.CancelledError):
        await work


@pytest.mark.parametrize("end", ["write", "commit", "refuse"])
async def test_nothing_stays_of_an_upload_that_is_cancelled_more_than_once(
    tmp_path: Path, end: str
) -> None:
    store = await opened(tmp_path)
    there = asyncio.Event()

    async def one() -> None:
        async with store.receive() as upload:
            await upload.write(b"a" * (3 << 20))
            if end == "commit":
                await upload.commit()
            there.set()
            if end == "write":
                await upload.write(b"b" * (3 << 20))
                await asyncio.sleep(60)
            if end == "refuse":
                raise ApiError(422, "It is no medium.")

    with suppress(ApiError):
        await cancelled_twice(asyncio.create_task(one()), there)
    await store.close()
    assert not list((tmp_path / "incoming").iterdir())
    assert store.used_bytes == on_disk(tmp_path) == (3 << 20 if end == "commit" else 0)


async def test_an_empty_medium_is_refused(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    with pytest.raises(ApiError, match="empty"):
        async with store.receive() as upload:
            await upload.commit()


async def test_an_invalid_index_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 1_000)
    with pytest.raises(SettingsError, match=r"store\.path: .* cannot be used \(file is not a"):
        await opened(tmp_path)


async def test_the_event_loop_touches_neither_disk_nor_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(tmp_path, quota_bytes=10_000, media_ttl_s=0.01)
    main = threading.get_ident()
    seen: set[tuple[str, bool]] = set()

    def watch(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            seen.add((name, threading.get_ident() == main))
            return real(*arguments, **options)

        patch.setattr(owner, name, watched)

    with monkeypatch.context() as patch:
        watch(patch, Index, "_execute")
        watch(patch, io, "open")
        for name in ("fsync", "open", "unlink", "rename", "mkdir", "scandir", "listdir", "stat"):
            watch(patch, os, name)
        for number in range(30):
            await put(store, bytes([number]) * 1_000, tenant="t" if number % 2 else None)
        for file in await store.files("t", None, 10):
            await store.save_facts(file.digest, {"a": 1})
            assert await store.facts(file.digest) == {"a": 1}
            async with store.pinned(file.digest):
                assert await store.file("t", file.id) == file
            await store.delete_file("t", file.id)
        await store.sweep()
    assert {name for name, _ in seen} >= {"_execute", "fsync", "unlink", "rename", "open"}
    assert not [name for name, on_the_loop in seen if on_the_loop]
    await store.close()
