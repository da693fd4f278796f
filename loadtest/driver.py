"""Send requests and record when each chunk of an answer arrives.

Server-sent events are read with aiohttp, without a client library, so that one core handles many
streams. An answer is complete if the stream has a finish reason, `[DONE]` and, where the server
reports usage, all requested tokens.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from loadtest.records import Answer
from loadtest.scenario import Request

CONNECT_S = 30.0


@dataclass
class Recording:
    """Answers of a run so far; consistent at all times, also if the run is cancelled."""

    answers: list[Answer] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    wall_s: float = 0.0

    def now(self) -> float:
        return time.perf_counter() - self.began


@dataclass(frozen=True)
class Driver:
    """Sends requests to one server.

    Attributes:
        url: of the chat completions endpoint.
        timeout_s: for one request, from connecting to its last byte.
        output_tokens: of a complete answer.
        headers: of every request, such as an authorization.
        on_first: called at the first token of an answer.
        on_end: called when an answer ends, successfully or not.
    """

    url: str
    timeout_s: float = 600.0
    output_tokens: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    on_first: Callable[[Answer], None] = lambda answer: None
    on_end: Callable[[Answer], None] = lambda answer: None

    async def closed(
        self, requests: Sequence[Request], concurrency: int, recording: Recording
    ) -> None:
        """Keep `concurrency` requests in flight until all are answered."""
        waiting = iter(requests)

        async def worker(session: aiohttp.ClientSession) -> None:
            for request in waiting:
                await self._send(session, request, recording)

        await self._gather([worker] * min(concurrency, len(requests)), recording)

    async def open(
        self, requests: Sequence[Request], times: Sequence[float], recording: Recording
    ) -> None:
        """Send each request at its time, however many are in flight."""

        def sender(request: Request, due: float) -> Worker:
            async def send(session: aiohttp.ClientSession) -> None:
                await asyncio.sleep(max(0.0, due - recording.now()))
                await self._send(session, request, recording, due)

            return send

        pairs = zip(requests, times, strict=True)
        await self._gather([sender(request, due) for request, due in pairs], recording)

    async def _gather(self, workers: Sequence[Worker], recording: Recording) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=CONNECT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            recording.began = time.perf_counter()
            try:
                async with asyncio.TaskGroup() as group:
                    for worker in workers:
                        group.create_task(worker(session))
            finally:
                recording.wall_s = recording.now()

    async def _send(
        self,
        session: aiohttp.ClientSession,
        request: Request,
        recording: Recording,
        due: float | None = None,
    ) -> None:
        answer = Answer(
            number=request.planned.number,
            novelty=request.planned.novelty,
            scheduled_s=due,
            sent_s=recording.now(),
        )
        recording.answers.append(answer)
        headers = {"content-type": "application/json", **self.headers}
        try:
            async with session.post(
                self.url, data=io.BytesIO(request.body), headers=headers
            ) as response:
                if response.status != 200:
                    await response.read()
                    self._fail(answer, f"http {response.status}")
                else:
                    await self._read(response, answer, recording)
        except TimeoutError:
            self._fail(answer, "timeout")
        except (aiohttp.ClientError, OSError) as error:
            self._fail(answer, type(error).__name__)
        answer.ended_s = recording.now()
        self.on_end(answer)

    async def _read(
        self, response: aiohttp.ClientResponse, answer: Answer, recording: Recording
    ) -> None:
        """Read a stream to its end."""
        finished = done = False
        async for data in events(response.content.iter_any()):
            now = recording.now()
            if data == b"[DONE]":
                done = True
                continue
            try:
                chunk: dict[str, Any] = json.loads(data)
            except ValueError:
                return self._fail(answer, "not JSON")
            if "error" in chunk:
                return self._fail(answer, "error in the stream")
            choices = chunk.get("choices") or []
            if choices and (choices[0].get("delta") or {}).get("content"):
                answer.chunk_s.append(now)
                if len(answer.chunk_s) == 1:
                    self.on_first(answer)
            finished = finished or any(choice.get("finish_reason") for choice in choices)
            if chunk.get("usage"):
                self._take_usage(answer, chunk["usage"])
        short = self.output_tokens is not None and 0 < answer.output_tokens < self.output_tokens
        whole = done and finished and bool(answer.chunk_s) and not short
        answer.status = "ok" if whole else "incomplete"
        return None

    @staticmethod
    def _fail(answer: Answer, error: str) -> None:
        answer.status, answer.error = "error", error

    @staticmethod
    def _take_usage(answer: Answer, usage: dict[str, Any]) -> None:
        answer.prompt_tokens = usage.get("prompt_tokens") or 0
        answer.output_tokens = usage.get("completion_tokens") or 0
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        answer.reduction = usage.get("reduction")


Worker = Callable[[aiohttp.ClientSession], Any]


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event, independent of chunk boundaries."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()
