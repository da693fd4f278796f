"""The gateway's side of the helper process that probes media."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ep_serve.gateway.errors import ApiError, internal_error

if TYPE_CHECKING:
    from pathlib import Path

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import ProbeSettings

logger = logging.getLogger(__name__)

_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG")
"""The helper gets nothing else: the environment may hold secrets."""
_GRACE_S = 5.0


class Prober:
    """Probes media, a few at a time."""

    def __init__(self, settings: ProbeSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._starting = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        names = ("max_duration_s", "max_frames", "max_pixels", "max_aspect")
        self._bounds = {name: getattr(settings, name) for name in names}

    async def probe(self, path: Path) -> dict[str, Any]:
        """The facts about a file (`probe_file.Facts` as a dict).

        Raises:
            ApiError: 415 or 422, with the limit named.
        """
        async with self._slots:
            with self._metrics.probe_seconds.time():
                answer = await self._ask(path)
        if "facts" in answer:
            facts: dict[str, Any] = answer["facts"]
            return facts
        code = "media_unsupported" if answer["status"] == 415 else "media_refused"
        raise ApiError(
            answer["status"], f"The medium {answer['reason']}.", code=code, param="messages"
        )

    async def close(self) -> None:
        """End the helper; children end with their time limit."""
        if self._reader is not None:
            self._reader.cancel()
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _ask(self, path: Path) -> dict[str, Any]:
        process = await self._running()
        name = str(next(self._numbers))
        job = {
            "id": name,
            "path": str(path),
            "bounds": self._bounds,
            "memory_bytes": self._settings.memory_bytes,
            "cpu_s": self._settings.cpu_s,
            "timeout_s": self._settings.timeout_s,
        }
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[name] = future
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job).encode() + b"\n")
            async with asyncio.timeout(self._settings.timeout_s + _GRACE_S):
                return await future
        except (TimeoutError, OSError):
            logger.error("the helper that probes media does not answer; it is started again")
            process.kill()
            raise internal_error() from None
        finally:
            self._answers.pop(name, None)

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "ep_serve.gateway.media.probe_server",
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                    env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                    start_new_session=True,  # a terminal's Ctrl-C is for the gateway
                )
                self._reader = asyncio.create_task(self._read(self._process))
            return self._process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            answer = json.loads(line)
            future = self._answers.get(answer["id"])
            if future is not None and not future.done():
                future.set_result(answer)
        await process.wait()
        for future in self._answers.values():
            if not future.done():
                future.set_exception(OSError("the helper ended"))
