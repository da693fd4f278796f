"""What the worker measured, brought to the API process.

vLLM has no channel from the model back to a response, so the API process asks the workers through
`collective_rpc`: once a request with media, when its first token is there, and once a second while
the engine is busy, so that `/metrics` is current.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, TypeVar

from ep_serve.engine import event_loop
from ep_serve.engine.metrics import metrics
from ep_serve.engine.selection_report import describe
from ep_serve.engine.worker_api import REPORT_METHOD, SELECTION_METHOD

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from vllm.v1.engine.async_llm import AsyncLLM

    from ep_serve.engine.processor import Reduction

T = TypeVar("T")

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Least time between two questions that no request asked."""

ANSWER_SECONDS = 10.0
"""A worker that does not answer in this time leaves a report without its numbers."""


class Reporter:
    """Asks the workers of one engine client."""

    def __init__(self, engine_client: AsyncLLM) -> None:
        self._engine = engine_client
        self._asked = 0.0
        self._task: asyncio.Task[Any] | None = None
        self._watch = asyncio.get_running_loop().create_task(event_loop.watch())

    async def usage(self, reduction: Reduction) -> dict[str, Any]:
        """The `usage.reduction` object of a request whose prompt has been processed."""
        key = reduction.key.hex()
        kept = await self._in_time(self._ask([key]))
        usage = {
            "keep_ratio": reduction.keep_ratio,
            "prompt_tokens_full": reduction.full_length,
            "prompt_tokens_reduced": reduction.reduced_length,
            "av_tokens_full": sum(reduction.full.values()),
            "av_tokens_kept": reduction.kept,
            **self._rates(reduction),
            **{
                modality: {"full": full, "kept": None if kept is None else kept[modality]}
                for modality, full in reduction.full.items()
            },
        }
        if reduction.shapes is not None:
            found = await self._in_time(self._call(SELECTION_METHOD, key)) or []
            record = next((record for record in found if record is not None), None)
            usage["selection"] = record and describe(reduction.shapes, record)
        return usage

    @staticmethod
    def _rates(reduction: Reduction) -> dict[str, float]:
        """The rates of sieves that tell sound and picture apart."""
        rates = {"rho_audio": reduction.ask.rho_audio, "rho_video": reduction.ask.rho_video}
        return {name: rate for name, rate in rates.items() if rate is not None}

    async def _in_time(self, answer: Coroutine[Any, Any, T]) -> T | None:
        try:
            return await asyncio.wait_for(answer, ANSWER_SECONDS)
        except Exception:  # a report must never fail a request that was answered
            logger.warning("the workers did not report what was kept", exc_info=True)
            return None

    def poll_soon(self) -> None:
        """Refresh the metrics in the background, unless that was done a moment ago."""
        idle = self._task is None or self._task.done()
        if idle and time.monotonic() - self._asked >= POLL_SECONDS:
            self._task = asyncio.get_running_loop().create_task(self._in_time(self._ask([])))

    async def _ask(self, keys: Sequence[str]) -> dict[str, int] | None:
        self._asked = time.monotonic()
        reports = await self._call(REPORT_METHOD, list(keys))
        totals = [report["totals"] for report in reports]
        metrics().worker(_sum(totals))
        found = (kept for report in reports for kept in report["kept"].values() if kept)
        return next(found, None)

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """One answer for each engine: that of its first worker (ranks hold the same)."""
        config = self._engine.vllm_config.parallel_config
        if config.data_parallel_size == 1:
            return [(await self._engine.collective_rpc(method, args=args))[0]]
        # The public call answers for the first engine only.
        answers = await self._engine.engine_core.call_utility_all_async(
            "collective_rpc", method, None, args, None
        )
        return [ranks[0] for ranks in answers]


def _sum(values: Sequence[Any]) -> Any:
    """Add numbers, or mappings of numbers key by key."""
    if isinstance(values[0], dict):
        return {key: _sum([value[key] for value in values]) for key in values[0]}
    return sum(values)


_reporter: Reporter | None = None


def bind(engine_client: AsyncLLM) -> Reporter:
    """Start reporting for the engine client of this process."""
    global _reporter
    _reporter = Reporter(engine_client)
    return _reporter


def reporter() -> Reporter | None:
    """The reporter of this process, once a server is up."""
    return _reporter
