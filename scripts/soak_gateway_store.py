"""Soak test: upload many files to a gateway and check that its disk stays within the quota.

    python scripts/soak_gateway_store.py [--uploads 10000] [--quota BYTES] [--kill]

Starts a gateway in front of a mock engine, uploads WAV files of 1 MB each (no two alike), and
checks after every hundredth that the folder exceeds the quota by no more than what is being
uploaded. With `--kill` the gateway is killed in the middle, started again on the same folder, and
the rest is uploaded. At the end the folder must be within the quota, every medium on disk must
belong to a file that is listed, and every listed file must be readable.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import secrets
import tempfile
import time
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx

from tests.gateway.conftest import gateway_process
from tests.gateway.mock_upstream import MockUpstream

MEGABYTE = 1_000_000
PARALLEL = 8
IN_USE = PARALLEL * MEGABYTE
CHECK_EVERY = 100


def sound() -> bytes:
    """A WAV file of a megabyte of noise."""
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(48_000)
        output.writeframes(secrets.token_bytes(MEGABYTE - 44))
    return file.getvalue()


def on_disk(folder: Path) -> int:
    total = 0
    for kind in ("blobs", "incoming"):
        for file in (folder / "store" / kind).rglob("*"):
            with suppress(FileNotFoundError):  # moved or evicted meanwhile
                total += file.stat().st_size if file.is_file() else 0
    return total


async def upload(client: httpx.AsyncClient, folder: Path, count: int) -> int:
    """Upload `count` files; returns the peak bytes on disk."""
    gate = asyncio.Semaphore(PARALLEL)
    most = 0

    async def one(number: int) -> None:
        nonlocal most
        async with gate:
            answer = await client.post("/v1/files", files={"file": ("a.wav", sound())})
            assert answer.status_code == 200, answer.text
        if number % CHECK_EVERY == 0:
            most = max(most, await asyncio.to_thread(on_disk, folder))

    await asyncio.gather(*(one(number) for number in range(count)))
    return most


async def check(client: httpx.AsyncClient, folder: Path) -> int:
    """Check that the listed files are those on disk; returns their number."""
    listed: list[str] = []
    after = ""
    while True:
        parameters = {"limit": "1000", **({"after": after} if after else {})}
        page = (await client.get("/v1/files", params=parameters)).json()
        listed += [entry["id"] for entry in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    for file_id in listed:
        content = await client.get(f"/v1/files/{file_id}/content")
        assert len(content.content) == MEGABYTE
    found = sum(file.is_file() for file in (folder / "store" / "blobs").glob("*/*"))
    assert found == len(listed), f"{found} on disk, {len(listed)} listed"
    return found


async def soak(folder: Path, uploads: int, quota: int, *, kill: bool = False) -> tuple[int, int]:
    """Upload and check; returns the peak bytes on disk and the number of kept files."""
    async with MockUpstream() as engine:
        if kill:
            await upload_and_kill(folder, engine, uploads // 2, quota)
            uploads -= uploads // 2
        async with run(folder, engine, quota) as client:
            most = await upload(client, folder, uploads)
            kept = await check(client, folder)
    assert most <= quota + IN_USE, f"{most} bytes on disk, the quota is {quota}"
    assert on_disk(folder) <= quota, f"{on_disk(folder)} bytes stay, the quota is {quota}"
    return most, kept


async def upload_and_kill(folder: Path, engine: MockUpstream, count: int, quota: int) -> None:
    """Upload `count` files, then kill the gateway during further uploads."""
    async with gateway_process(folder, engine, store={"quota_bytes": quota}) as (process, port):
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60)
        async with client:
            await upload(client, folder, count)
            more = asyncio.create_task(upload(client, folder, 500))
            await asyncio.sleep(0.5)
            process.kill()
            with suppress(httpx.HTTPError):
                await more


@asynccontextmanager
async def run(folder: Path, engine: MockUpstream, quota: int) -> AsyncIterator[httpx.AsyncClient]:
    """Start a gateway; yields a client."""
    async with (
        gateway_process(folder, engine, store={"quota_bytes": quota}) as (_, port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        yield client


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uploads", type=int, default=10_000)
    parser.add_argument("--quota", type=int, default=200 * 2**20, metavar="BYTES")
    parser.add_argument("--kill", action="store_true", help="kill -9 the gateway half-way")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        most, kept = await soak(Path(name), given.uploads, given.quota, kill=given.kill)
    seconds = time.monotonic() - began
    print(
        f"{given.uploads} uploads of {MEGABYTE} bytes in {seconds:.0f} s; at most {most} bytes on "
        f"disk (quota {given.quota}); {kept} files kept, all listed and readable"
    )


if __name__ == "__main__":
    asyncio.run(main())
