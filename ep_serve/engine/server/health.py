"""`/health` fails when the engine hangs, not only when it has ended.

vLLM 0.32 checks that the engine's processes are alive. One that is stuck (a collective operation
that never returns, a deadlock, a stopped process) is, so `AsyncLLM.check_health` is wrapped: while
requests run it sends the engine core a utility call, which is answered between two steps. A call
without an answer for `step_timeout_s` means that no step has ended for that long.

The clock runs on when the clients have given up: a hung engine does not recover by that. Start-up
(profiling, compilation, warm-up) is over before there is an HTTP server.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from ep_serve.engine.settings import Settings

if TYPE_CHECKING:
    from ep_serve.engine.server.patching import Patch

STEP_SECONDS = 600.0
"""Default of `step_timeout_s`: twice what vLLM gives a step of a worker in another process."""

CPU_STEP_SECONDS = 3600.0
"""The same on a CPU, where one step may take a long clip through the whole refiner."""

PING_METHOD = "is_scheduler_paused"
"""A method of vLLM's `EngineCore` that computes nothing."""

logger = init_logger(__name__)

_original_check_health = AsyncLLM.check_health


class StepWatch:
    """How long the engines of one client have not come to the end of a step."""

    def __init__(self, engine: AsyncLLM) -> None:
        given = Settings.of(engine.model_config).engine.step_timeout_s
        self.timeout = given or (CPU_STEP_SECONDS if current_platform.is_cpu() else STEP_SECONDS)
        self._engine = engine
        self._call: asyncio.Task[Any] | None = None
        self._sent_at = 0.0

    def seconds(self) -> float:
        """Seconds since the pending call to the engine core was sent; sends one if none is."""
        now = time.monotonic()
        if self._call is not None:
            if not self._call.done():
                return now - self._sent_at
            self._call.exception()  # an engine that ended; `errored` says so
            self._call = None
        if self._engine.get_num_unfinished_requests():
            self._sent_at = now
            ask = self._engine.engine_core.call_utility_all_async(PING_METHOD)
            self._call = asyncio.ensure_future(ask)
        return 0.0


async def _check_health(self: AsyncLLM) -> None:
    await _original_check_health(self)
    watch: StepWatch | None = getattr(self, "_step_watch", None)
    if watch is None:
        watch = self._step_watch = StepWatch(self)
    if (seconds := watch.seconds()) > watch.timeout:
        logger.error("requests run and no engine step has ended for %.0f s", seconds)
        raise EngineDeadError


PATCHES: tuple[Patch, ...] = ((AsyncLLM, "check_health", _check_health),)
