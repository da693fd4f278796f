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

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.slots import FairSlots

if TYPE_CHECKING:
    from pathlib import Path

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import ProbeSettings

logger = logging.getLogger(__name__)

_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG")
"""The helper gets nothing else: the environment may hold secrets."""
MODULE = "ep_serve.gateway.media.probe.helper"
_GRACE_S = 5.0


class _HelperError(Exception):
    """The helper ended, or does not answer."""


class _Helper:
    """A helper process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls) -> _Helper:
        """Start one.

        Raises:
            OSError: the system has no room for it.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            MODULE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,  # a terminal's Ctrl-C is for the gateway
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._reader.done() and self._process.returncode is None

    async def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a job.

        Raises:
            _HelperError: there is none; then the helper is dead.
        """
        name = str(next(self._numbers))
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[name] = future
        try:
            if not self.alive:
                raise _HelperError
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"id": name, **job}).encode() + b"\n")
            async with asyncio.timeout(timeout_s):
                return await future
        except (TimeoutError, OSError, RuntimeError):  # what writing to an ended process raises
            self.kill()
            raise _HelperError from None
        finally:
            del self._answers[name]

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """End the helper; its children end with their time limit."""
        self.kill()
        self._reader.cancel()
        await self._process.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            async for line in self._process.stdout:
                answer = json.loads(line)
                future = self._answers.get(answer["id"])
                if future is not None and not future.done():
                    future.set_result(answer)
        except (OSError, LookupError, ValueError):
            self.kill()  # it says what nobody understands
        finally:  # its children have ended too: they write to the same pipe
            for future in self._answers.values():
                if not future.done():
                    future.set_exception(_HelperError())


class Prober:
    """Probes media, a few at a time."""

    def __init__(self, settings: ProbeSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._slots = FairSlots(settings.concurrency)
        self._helper: _Helper | None = None
        self._starting = asyncio.Lock()
        self._running: set[asyncio.Task[dict[str, Any]]] = set()
        self._limits = {
            name: getattr(settings, name) for name in ("memory_bytes", "cpu_s", "timeout_s")
        }
        names = ("max_duration_s", "max_frames", "max_pixels", "max_aspect")
        self._bounds = {name: getattr(settings, name) for name in names}

    async def probe(self, path: Path, share: str = "") -> dict[str, Any]:
        """The facts about a file (`inspection.Facts` as a dict).

        Args:
            path: the file.
            share: whose share of the slots it takes.

        Raises:
            ApiError: 415 or 422, with the limit named; 503 if no process can be started.
        """
        await self._slots.acquire(share)
        # The work goes on, and with it the slot, when nobody waits for it any more.
        running = asyncio.create_task(self._ask(path))
        self._running.add(running)
        running.add_done_callback(lambda _: self._ended(running, share))
        answer = await asyncio.shield(running)
        if "facts" in answer:
            facts: dict[str, Any] = answer["facts"]
            return facts
        code = "media_unsupported" if answer["status"] == 415 else "media_refused"
        raise ApiError(
            answer["status"], f"The medium {answer['reason']}.", code=code, param="messages"
        )

    async def close(self) -> None:
        """End the helper."""
        for running in self._running:
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._helper is not None:
            await self._helper.close()

    def _ended(self, running: asyncio.Task[dict[str, Any]], share: str) -> None:
        self._running.discard(running)
        self._slots.release(share)
        if not running.cancelled():
            running.exception()  # whoever would have heard of it may be gone

    async def _ask(self, path: Path) -> dict[str, Any]:
        job = {"path": str(path), "bounds": self._bounds, **self._limits}
        seconds = self._settings.timeout_s + _GRACE_S
        try:
            with self._metrics.probe_seconds.time():
                try:
                    return await (await self._shared()).ask(job, seconds)
                except _HelperError:
                    logger.error("the process that probes media ended; its media are tried alone")
                return await self._ask_alone(job, seconds)
        except OSError as error:
            logger.error("no process to probe media: %s", error.strerror)
            raise ApiError(
                503, "Media cannot be checked now.", code="overloaded", retry_after=5
            ) from None

    async def _ask_alone(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Ask a helper that has nothing else to do: only the medium that ends it is refused."""
        helper = await _Helper.start()
        try:
            return await helper.ask(job, seconds)
        except _HelperError:
            return {"status": 422, "reason": "cannot be read safely"}
        finally:
            await helper.close()

    async def _shared(self) -> _Helper:
        async with self._starting:
            if self._helper is None or not self._helper.alive:
                self._helper = await _Helper.start()
            return self._helper
