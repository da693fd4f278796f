"""What the logs say, and what they never say."""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
from collections.abc import Iterator

import httpx
import pytest

from ep_serve.gateway import logs
from tests.clips import make_image
from tests.gateway.conftest import MakeWorld, bearer
from tests.gateway.test_media import data_url, part

pytestmark = pytest.mark.anyio


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    logs.configure("debug")
    yield written
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("ep_serve").setLevel(logging.NOTSET)


async def test_every_line_is_json_with_the_request_id(world: MakeWorld, lines: io.StringIO) -> None:
    async with world() as w:
        await w.ask(headers={"x-request-id": "abc"})
    records = [json.loads(line) for line in lines.getvalue().splitlines()]
    access = next(record for record in records if record["message"] == "request")
    assert access["request_id"] == "abc"
    assert access["status"] == 200
    assert access["route"] == "/v1/chat/completions"
    assert access["level"] == "INFO"


async def test_a_malformed_form_is_one_line(world: MakeWorld, lines: io.StringIO) -> None:
    async with world() as w:
        before = len(lines.getvalue().splitlines())
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = await w.client.post("/v1/files", content=b"--a\r\n", headers=headers)
        assert answer.status_code == 400
        assert len(lines.getvalue().splitlines()) == before + 1


async def test_neither_media_nor_keys_nor_texts_are_logged(
    world: MakeWorld, lines: io.StringIO
) -> None:
    picture = make_image()
    async with world(keys=[{"name": "a"}]) as w:
        content = [*part("image_url", data_url(picture)), {"type": "text", "text": "a secret text"}]
        await w.ask(content, headers=bearer("a"))
        await w.ask(content, headers={"authorization": "Bearer a-wrong-key"})
        w.engine.mode = "hang"
        with pytest.raises(httpx.ReadTimeout):
            await w.client.post(
                "/v1/chat/completions",
                json={"model": "mock", "messages": [{"role": "user", "content": "a secret text"}]},
                headers=bearer("a"),
                timeout=0.2,
            )
        w.engine.mode = "echo_url"
        await w.ask(content, headers=bearer("a"))
        w.engine.mode = "error"
        await w.ask(content, headers=bearer("a"))
        await w.client.get("/v1/files/a-secret-id?key=a-secret-query", headers=bearer("a"))
    logged = lines.getvalue()
    assert '"key": "a"' in logged
    for secret in (
        bearer("a")["authorization"].removeprefix("Bearer "),
        "a-wrong-key",
        "a secret text",
        "a-secret",
        base64.b64encode(picture).decode()[:60],
        "/media/",
    ):
        assert secret not in logged
