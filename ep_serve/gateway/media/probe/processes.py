"""Run probe jobs in the helper process."""

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
"""Variables that the helper inherits; others may hold secrets."""
MODULE = "ep_serve.gateway.media.probe.helper"
_GRACE_S = 5.0


class _HelperError(Exception):
    """The helper ended or does not respond."""


class _Helper:
    """A helper process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls) -> _Helper:
        """Start a helper.

        Raises:
            OSError: the process cannot be started.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            MODULE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C in a terminal must not kill it
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._reader.done() and self._process.returncode is None

    async def submit(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Run a job and return its result.

        Raises:
            _HelperError: the helper ended or timed out; it is killed.
        """
        name = str(next(self._numbers))
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[name] = future
        try:
            if not self.is_alive:
                raise _HelperError
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"id": name, **job}).encode() + b"\n")
            async with asyncio.timeout(timeout_s):
                return await future
        except (TimeoutError, OSError, RuntimeError):  # RuntimeError: the process has ended
            self.kill()
            raise _HelperError from None
        finally:
            del self._answers[name]

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Stop the helper; its children end by their time limits."""
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
            self.kill()  # invalid output
        finally:  # its children have ended too: they share the pipe
            for future in self._answers.values():
                if not future.done():
                    future.set_exception(_HelperError())


class MediaProber:
    """Probes media with limited concurrency."""

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

    async def probe(self, path: Path, tenant: str = "") -> dict[str, Any]:
        """Probe a file and return `inspection.MediaInfo` as a dict.

        Args:
            path: the file.
            tenant: tenant whose slot it uses.

        Raises:
            ApiError: 415 or 422 with the limit, 503 if no process can be started.
        """
        await self._slots.acquire(tenant)
        # If the request is cancelled, the job continues and keeps its slot.
        running = asyncio.create_task(self._run(path))
        self._running.add(running)
        running.add_done_callback(lambda _: self._ended(running, tenant))
        answer = await asyncio.shield(running)
        if "facts" in answer:
            facts: dict[str, Any] = answer["facts"]
            return facts
        code = "media_unsupported" if answer["status"] == 415 else "media_refused"
        raise ApiError(
            answer["status"], f"The medium {answer['reason']}.", code=code, param="messages"
        )

    async def close(self) -> None:
        """Stop the helper."""
        for running in self._running:
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._helper is not None:
            await self._helper.close()

    def _ended(self, running: asyncio.Task[dict[str, Any]], tenant: str) -> None:
        self._running.discard(running)
        self._slots.release(tenant)
        if not running.cancelled():
            running.exception()  # mark as retrieved

    async def _run(self, path: Path) -> dict[str, Any]:
        job = {"path": str(path), "bounds": self._bounds, **self._limits}
        seconds = self._settings.timeout_s + _GRACE_S
        try:
            with self._metrics.probe_seconds.time():
                try:
                    return await (await self._shared_helper()).submit(job, seconds)
                except _HelperError:
                    logger.error(
                        "the probe helper ended; its media are probed in separate processes"
                    )
                return await self._run_isolated(job, seconds)
        except OSError as error:
            logger.error("cannot start the probe helper: %s", error.strerror)
            raise ApiError(
                503, "Media cannot be probed at the moment.", code="overloaded", retry_after=5
            ) from None

    async def _run_isolated(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Run a job in its own helper, so that only the medium that crashes it is rejected."""
        helper = await _Helper.start()
        try:
            return await helper.submit(job, seconds)
        except _HelperError:
            return {"status": 422, "reason": "cannot be read safely"}
        finally:
            await helper.close()

    async def _shared_helper(self) -> _Helper:
        async with self._starting:
            if self._helper is None or not self._helper.is_alive:
                self._helper = await _Helper.start()
            return self._helper
