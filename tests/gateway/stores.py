"""Helpers for tests of the media store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ep_serve.gateway.media.store.index import Blob
from ep_serve.gateway.media.store.local import Store
from ep_serve.gateway.metrics import Metrics
from ep_serve.gateway.settings import StoreSettings


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
