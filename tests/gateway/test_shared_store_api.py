"""Two gateways that share a bucket, seen by clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clips import make_image, make_wav
from tests.gateway.bucket import Server
from tests.gateway.conftest import MakeWorld, bearer
from tests.gateway.mock_upstream import MockUpstream
from tests.gateway.test_api import check_error

pytestmark = pytest.mark.anyio


# -- through the gateway ----------------------------------------------------------------------


async def test_a_file_uploaded_to_one_gateway_is_used_at_another(
    world: MakeWorld, bucket: Server, tmp_path: Path
) -> None:
    keys = [{"name": "anna"}, {"name": "ben"}]
    folder = {"path": str(tmp_path / "second")}
    async with (
        world(keys=keys, store={"s3": bucket.settings}) as one,
        world(
            [MockUpstream(fetch_media=True)], keys, store={"s3": bucket.settings, **folder}
        ) as other,
    ):
        picture = make_image()
        sent = (await one.upload(picture, headers=bearer("anna"))).json()
        content = [{"type": "image_url", "image_url": {"file_id": sent["id"]}}]
        answer = await other.ask(content, headers=bearer("anna"))
        assert answer.status_code == 200, answer.text
        assert other.engine.media == [picture]
        check_error(await other.ask(content, headers=bearer("ben")), 404, "file_not_found")
        url = f"/v1/files/{sent['id']}"
        got = await other.client.get(f"{url}/content", headers=bearer("anna"))
        assert got.content == picture
        assert (await other.client.get(url, headers=bearer("anna"))).json() == sent
        listed = (await other.client.get("/v1/files", headers=bearer("anna"))).json()
        assert listed["data"] == [sent]
        assert (await other.client.delete(url, headers=bearer("anna"))).json()["deleted"]
        check_error(await one.ask(content, headers=bearer("anna")), 404, "file_not_found")
        assert bucket.objects() == {}


async def test_what_is_refused_never_reaches_the_bucket(world: MakeWorld, bucket: Server) -> None:
    async with world(store={"s3": bucket.settings}) as w:
        check_error(await w.upload(b"no medium"), 415)
        check_error(await w.upload(make_wav(1)[:30]), 415)
        assert bucket.objects() == {}
        assert w.gateway.media.store.used_bytes == 0


async def test_a_bucket_that_goes_away_stops_files_and_nothing_else(
    world: MakeWorld, another_server: Server
) -> None:
    async with world(store={"s3": {**another_server.settings, "timeout_s": 5}}) as w:
        sent = (await w.upload(make_image())).json()
        another_server.stop()
        refused = await w.upload(make_image(number=2))
        error = check_error(refused, 503, "storage_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert str(another_server.port) not in error["message"]
        check_error(await w.client.get(f"/v1/files/{sent['id']}"), 503, "storage_unavailable")
        assert (await w.ask("text")).status_code == 200
        assert (await w.client.get("/ready")).status_code == 200
