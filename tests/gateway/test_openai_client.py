"""The official client, as people use it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from tests.clips import make_clip, make_image
from tests.gateway.conftest import MakeWorld, World, bearer
from tests.gateway.mock_upstream import MODEL, MockUpstream

pytestmark = pytest.mark.anyio

ASK: Any = [{"role": "user", "content": "Hello"}]


@asynccontextmanager
async def client_of(w: World, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    base = f"http://127.0.0.1:{w.now.port}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as client:
        yield client


async def in_thread(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


async def test_plain_and_streamed_answers_sync_and_async(world: MakeWorld) -> None:
    async with world() as w, client_of(w) as client:
        base = f"http://127.0.0.1:{w.now.port}/v1"
        sync = openai.OpenAI(base_url=base, api_key="none", max_retries=0)
        plain = await client.chat.completions.create(model=MODEL, messages=ASK)
        text = "t0 t1 t2 t3 t4 "
        assert plain.choices[0].message.content == text
        same = await in_thread(lambda: sync.chat.completions.create(model=MODEL, messages=ASK))
        assert same == plain
        stream = await client.chat.completions.create(
            model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert chunks[-1].usage is not None

        def streamed() -> str:
            found = sync.chat.completions.create(model=MODEL, messages=ASK, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in found)

        assert await in_thread(streamed) == text
        sync.close()


async def test_fields_of_ours_go_through_extra_body(world: MakeWorld) -> None:
    async with world() as w, client_of(w) as client:
        await client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            logprobs=True,
            top_logprobs=2,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            extra_body={"keep_ratio": 0.1, "fps": 1},
        )
        seen = w.engine.requests[-1]
        assert (seen["keep_ratio"], seen["fps"], seen["logprobs"]) == (0.1, 1, True)
        assert seen["tools"][0]["function"]["name"] == "f"


async def test_files_and_models(world: MakeWorld) -> None:
    async with world([MockUpstream(fetch_media=True)]) as w, client_of(w) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        clip = make_clip(1)
        made = await client.files.create(file=("a.mp4", clip), purpose="vision")
        assert [file.id async for file in client.files.list()] == [made.id]
        assert (await client.files.retrieve(made.id)).bytes == len(clip)
        assert (await client.files.content(made.id)).content == clip
        content: Any = [{"type": "file", "file": {"file_id": made.id}}]
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}]
        )
        assert w.engine.media == [clip]
        assert (await client.files.delete(made.id)).deleted


async def test_errors_are_the_clients_own(world: MakeWorld) -> None:
    keys = [{"name": "a", "requests_per_minute": 4, "models": [MODEL]}]
    async with world(keys=keys) as w, client_of(w) as nobody:
        with pytest.raises(openai.AuthenticationError):
            await nobody.models.list()
    key = bearer("a")["authorization"].removeprefix("Bearer ")
    async with world(keys=keys) as w, client_of(w, key) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(
                model=MODEL, messages=ASK, extra_body={"keep_ratio": 2}
            )
        assert bad.value.param == "keep_ratio"
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve("file-x")
        with pytest.raises(openai.PermissionDeniedError):
            await client.chat.completions.create(model="other", messages=ASK)
        w.engine.mode, w.engine.interval_s = "die_mid", 0.02
        stream = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
        with pytest.raises(openai.APIError):
            async for _chunk in stream:
                pass
        with pytest.raises(openai.RateLimitError) as limited:
            await client.models.list()
        assert limited.value.response.headers["retry-after"]


async def test_a_picture_goes_inline(world: MakeWorld) -> None:
    async with world([MockUpstream(fetch_media=True)]) as w, client_of(w) as client:
        url = f"data:image/png;base64,{base64.b64encode(make_image()).decode()}"
        await client.chat.completions.create(
            model=MODEL,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
                    ],
                }
            ],
        )
        assert w.engine.media == [make_image()]
