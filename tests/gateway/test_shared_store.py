"""Files in a bucket that several gateways tenant, on a server that speaks S3."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.store import index
from ep_serve.gateway.media.store.index import File
from ep_serve.gateway.media.store.shared import ORPHAN_S, SharedStore
from ep_serve.gateway.metrics import Metrics
from ep_serve.gateway.settings import S3Settings, SettingsError, StoreSettings
from tests.gateway.bucket import KEYS, Server

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def gateway(
    bucket: Server, folder: Path, s3: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[SharedStore]:
    shared = S3Settings(**{**bucket.settings, **(s3 or {})})
    store = SharedStore(StoreSettings(path=folder, **settings), shared, Metrics())
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def two(bucket: Server, tmp_path: Path) -> AsyncIterator[list[SharedStore]]:
    """Two gateways on one bucket."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(gateway(bucket, tmp_path / name)) for name in ("a", "b")
        ]


async def put(store: SharedStore, data: bytes, tenant: str = "t", name: str = "name") -> File:
    async with store.receive() as upload:
        await upload.write(data)
        blob = await upload.commit()
    async with store.pinned(blob.digest):
        return await store.add_file(tenant, blob, name, "vision")


async def content(store: SharedStore, file: File) -> bytes:
    async with store.pinned(file.digest) as path:
        return path.read_bytes()


def store_path(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


async def names(store: SharedStore, tenant: str = "t") -> list[str]:
    return [file.name for file in await store.files(tenant, None, 1_000)]


async def test_one_gateway_serves_what_another_received(two: list[SharedStore]) -> None:
    a, b = two
    large = bytes(range(256)) * 50_000  # in several parts
    file = await put(a, large, name="naïve \u202e?.mp4")
    found = await b.file("t", file.id)
    assert found == file
    assert await content(b, found) == large
    assert await names(b) == ["naïve \u202e?.mp4"]


async def test_the_oldest_files_of_a_tenant_above_the_limit_are_evicted(
    two: list[SharedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_FILES", 3)
    for number in range(5):  # of one content
        await put(two[0], b"the same", name=str(number))
    assert await names(two[1]) == ["4", "3", "2"]


async def test_a_gateway_with_an_empty_disk_finds_all_files(bucket: Server, tmp_path: Path) -> None:
    async with gateway(bucket, tmp_path / "old") as store:
        files = [await put(store, bytes([number]) * 100, name=str(number)) for number in range(5)]
    async with gateway(bucket, tmp_path / "new") as store:
        assert await names(store) == ["4", "3", "2", "1", "0"]
        assert store._shared.used == 500
        assert [await content(store, file) for file in files] == [
            bytes([number]) * 100 for number in range(5)
        ]


async def test_the_same_content_is_in_the_bucket_once(
    two: list[SharedStore], bucket: Server
) -> None:
    a, b = two
    files = [await put(store, b"same", tenant) for store in two for tenant in ("t", "u")]
    assert bucket.blobs() == {hashlib.sha256(b"same").hexdigest(): 4}
    assert len({file.id for file in files}) == 4
    assert a._shared.used == b._shared.used == 4


async def test_a_file_deleted_at_one_gateway_is_gone_at_all(
    two: list[SharedStore], bucket: Server
) -> None:
    a, b = two
    first, second = await put(a, b"same"), await put(b, b"same")
    assert await content(b, first) == b"same"
    await a.delete_file("t", first.id)
    with pytest.raises(ApiError, match="does not exist"):
        await b.file("t", first.id)
    assert await content(b, await b.file("t", second.id)) == b"same"
    await b.delete_file("t", second.id)
    assert bucket.objects() == {}
    assert await names(a) == []


async def test_a_file_belongs_to_its_tenant(two: list[SharedStore]) -> None:
    a, b = two
    file = await put(a, b"x", "t")
    for store in two:
        for tenant, file_id in (("u", file.id), ("t", "file-none"), ("t", "../t/" + file.id)):
            with pytest.raises(ApiError) as error:
                await store.file(tenant, file_id)
            assert error.value.status == 404
    assert await names(b, "u") == []


async def test_files_are_listed_in_pages_from_new_to_old(two: list[SharedStore]) -> None:
    a, b = two
    for number in range(7):
        await put(two[number % 2], bytes([number]), name=str(number))
    page = await b.files("t", None, 3)
    assert [file.name for file in page] == ["6", "5", "4"]
    rest = await a.files("t", page[-1].id, 10)
    assert [file.name for file in rest] == ["3", "2", "1", "0"]


async def test_the_bucket_stays_within_its_quota(bucket: Server, tmp_path: Path) -> None:
    async with gateway(bucket, tmp_path, {"quota_bytes": 5_000}) as store:

        async def one(number: int) -> None:
            await put(store, number.to_bytes(4, "big") * 250, name=str(number))

        for start in range(0, 20, 4):
            await asyncio.gather(*(one(number) for number in range(start, start + 4)))
            assert sum(bucket.blobs().values()) == store._shared.used <= 5_000
        kept = await store.files("t", None, 100)
        assert {file.digest for file in kept} == set(bucket.blobs())
        assert len(kept) == 5
        with pytest.raises(ApiError) as error:
            await put(store, b"x" * 5_001)
        assert error.value.status == 503
        assert len(await store.files("t", None, 100)) == 5


async def test_two_gateways_keep_one_quota(bucket: Server, tmp_path: Path) -> None:
    quota = {"quota_bytes": 5_000}
    async with (
        gateway(bucket, tmp_path / "a", quota) as a,
        gateway(bucket, tmp_path / "b", quota) as b,
    ):
        for number in range(12):
            await put((a, b)[number % 2], bytes([number]) * 1_000, name=str(number))
        for store in (a, b):
            await store._refresh_index()
        await put(a, b"z" * 1_000)
        assert sum(bucket.blobs().values()) <= 5_000
        for store in (a, b):
            assert {f.digest for f in await store.files("t", None, 99)} == set(bucket.blobs())


async def test_the_disk_is_a_cache_within_its_own_quota(bucket: Server, tmp_path: Path) -> None:
    async with gateway(bucket, tmp_path, quota_bytes=3_000) as store:
        files = [await put(store, bytes([number]) * 1_000) for number in range(6)]
        assert store.used_bytes == 3_000
        assert [await content(store, file) for file in files] == [
            bytes([number]) * 1_000 for number in range(6)
        ]
        assert store.used_bytes == 3_000


async def test_media_of_requests_stay_out_of_the_bucket(bucket: Server, tmp_path: Path) -> None:
    async with gateway(bucket, tmp_path) as store:
        async with store.receive() as upload:
            await upload.write(b"inline")
            blob = await upload.commit()
        async with store.pinned(blob.digest) as path:
            assert path.read_bytes() == b"inline"
    assert bucket.objects() == {}


async def test_files_and_orphaned_blobs_expire(bucket: Server, tmp_path: Path) -> None:
    often = {"sync_interval_s": 0.01}
    async with gateway(bucket, tmp_path, often, file_ttl_s=1) as store:
        file = await put(store, b"old")
        bucket.raw.put(store_path("aaaa"), b"of a gateway that died")
        await asyncio.sleep(2.1)
        await store.sweep()
        assert set(bucket.objects()) == set(map(store_path, ("aaaa", file.digest)))
        with pytest.raises(ApiError):
            await store.file("t", file.id)
        store._shared._execute("UPDATE blobs SET used = ?", time.time() - ORPHAN_S - 1)
        await store.sweep()
        assert bucket.objects() == {}
        assert store._shared.used == 0


async def test_a_file_that_has_expired_is_not_served_before_it_is_swept(
    two: list[SharedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await put(two[0], b"old")
    monkeypatch.setattr(time, "time", lambda: float(file.expires))
    for store in two:
        with pytest.raises(ApiError) as error:
            await store.file("t", file.id)
        assert error.value.status == 404
        assert await names(store) == []


def nothing_is_held(store: SharedStore) -> bool:
    held = (store._in_use._users, store._shared_pins._users, store._index.reserved)
    return not any((*held, store._shared.reserved, *store._incoming.iterdir()))


@pytest.mark.parametrize("step", ["put", "put_file", "delete"])
async def test_a_bucket_that_fails_in_the_middle_of_an_upload_keeps_no_room(
    bucket: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with gateway(bucket, tmp_path, {"quota_bytes": 2_000}) as store:
        kept = [await put(store, bytes([number]) * 1_000) for number in range(2)]

        async def fails(*_: Any) -> None:
            raise ApiError(503, "The bucket is full.", code="storage_unavailable")

        with monkeypatch.context() as patch:
            patch.setattr(store._bucket, step, fails)
            for number in range(3):
                with pytest.raises(ApiError) as error:
                    await put(store, b"new" + bytes([number]) * 997)
                assert error.value.code == "storage_unavailable"
        assert nothing_is_held(store)
        await store._refresh_index()
        await put(store, b"z" * 1_000)
        await store._refresh_index()
        assert sum(bucket.blobs().values()) <= 2_000
        assert kept[1].digest != kept[0].digest


async def test_uploads_and_downloads_that_are_cancelled_leave_nothing(
    two: list[SharedStore],
) -> None:
    a, b = two
    file = await put(a, bytes(range(256)) * 20_000)
    moments = random.Random(0)

    async def one(number: int) -> None:
        work: Any = content(b, file) if number % 2 else put(a, bytes([number]) * 500_000)
        task = asyncio.create_task(work)
        await asyncio.sleep(moments.random() * 0.1)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*(one(number) for number in range(30)))
    for store in two:
        await asyncio.gather(*store._moves, *store._ending)
        assert nothing_is_held(store)
    assert await content(b, file) == bytes(range(256)) * 20_000


async def test_a_copy_that_the_disk_has_no_room_for_is_refused(
    bucket: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        gateway(bucket, tmp_path / "a") as a,
        gateway(bucket, tmp_path / "b") as b,
    ):
        file = await put(a, b"x" * 1_000)

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("ep_serve.gateway.media.store.upload.Upload._write", full)
            with pytest.raises(ApiError) as error:
                await content(b, file)
            assert error.value.status == 507
            assert await content(a, file) == b"x" * 1_000
        assert nothing_is_held(b)
        assert await content(b, file) == b"x" * 1_000


async def test_a_file_whose_content_is_gone_is_gone(two: list[SharedStore], bucket: Server) -> None:
    a, b = two
    file = await put(a, b"lost")
    bucket.raw.delete(store_path(file.digest))
    with pytest.raises(ApiError) as error:
        await content(b, await b.file("t", file.id))
    assert error.value.status == 404
    for store in two:
        await store._refresh_index()
    await a._refresh_index()  # what it knew itself it forgets first
    assert bucket.objects() == {}


async def test_content_that_was_changed_in_the_bucket_is_not_served(
    two: list[SharedStore], bucket: Server
) -> None:
    a, b = two
    file = await put(a, b"right")
    bucket.raw.put(store_path(file.digest), b"wrong")
    with pytest.raises(ApiError) as error:
        await content(b, file)
    assert error.value.status == 404


async def test_foreign_objects_do_no_harm(bucket: Server, tmp_path: Path) -> None:
    for name, body in (("files/x/file-1", b"no json"), ("files/x/file-2", b"{}"), ("else", b"")):
        bucket.raw.put(name, body)
    async with gateway(bucket, tmp_path) as store:
        await put(store, b"x")
        assert await names(store) == ["name"]
        await store._refresh_index()


async def test_a_prefix_keeps_two_deployments_apart(bucket: Server, tmp_path: Path) -> None:
    async with (
        gateway(bucket, tmp_path / "a", {"prefix": "team/a"}) as a,
        gateway(bucket, tmp_path / "b", {"prefix": "team/b"}) as b,
    ):
        file = await put(a, b"x")
        with pytest.raises(ApiError):
            await b.file("t", file.id)
        assert all(name.startswith("team/a/") for name in bucket.objects())


async def test_an_unusable_bucket_is_reported_at_startup(bucket: Server, tmp_path: Path) -> None:
    for wrong in ({"bucket": "nowhere"}, {"endpoint": "http://127.0.0.1:1", "timeout_s": 0.2}):
        with pytest.raises(
            SettingsError, match=r"store\.s3: the bucket .* cannot be used"
        ) as error:
            async with gateway(bucket, tmp_path, wrong):
                pass
        assert KEYS["secret_access_key"] not in str(error.value)
