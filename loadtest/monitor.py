"""Sample a server's metrics and the memory of its processes during a run.

Gauges are read periodically, and at the first token of an answer: its prompt is then in the KV
cache, and short answers would be missed. Counters are read before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from loadtest.records import Sample

INTERVAL_S = 0.5
MIN_INTERVAL_S = 0.05
READ_TIMEOUT_S = 5.0
LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
LOOP_DELAY_METRIC = "ep_serve_event_loop_late_seconds"
"""The only histogram whose buckets are kept."""
SUMMED_LABELS = re.compile(r'(?:^|,)(?:engine|model_name|engine_index)="[^"]*"')
"""Labels over which series are summed: one server may run several engines."""


def parse(text: str) -> dict[str, float]:
    """Prometheus text as {series: value}; series that differ only in their engine are summed.

    Buckets of histograms and creation times are left out, but for those of `LOOP_DELAY_METRIC`.
    """
    series: dict[str, float] = {}
    for name, labels, value in LINE.findall(text):
        if name.endswith(("_bucket", "_created")) and name != f"{LOOP_DELAY_METRIC}_bucket":
            continue
        kept = SUMMED_LABELS.sub("", labels).strip(",")
        key = f"{name}{{{kept}}}" if kept else name
        series[key] = series.get(key, 0.0) + float(value)
    return series


def cache_size(text: str) -> tuple[int | None, int | None]:
    """Usable blocks of the KV cache and tokens in one, from vLLM's `cache_config_info`."""
    blocks = re.search(r'num_gpu_blocks="(\d+)"', text)
    size = re.search(r'block_size="(\d+)"', text)
    # vLLM reserves one block, which its usage does not count.
    return (int(blocks[1]) - 1 if blocks else None, int(size[1]) if size else None)


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Counters that grew, and by how much."""
    grown = {
        name: value - before.get(name, 0.0)
        for name, value in after.items()
        if re.search(r"_(total|sum|count|bucket)(\{|$)", name)
    }
    return {name: value for name, value in grown.items() if value > 0}


def memory_of(pid: int) -> int | None:
    """Memory of a process and its descendants, shared pages counted once; None if it has ended.

    Linux only. Without access to the proportional set size, all resident pages count.
    """
    total = None
    for member in _tree(pid):
        held = _proportional(member)
        if held is not None:
            total = (total or 0) + held
    return total


def _tree(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        current = waiting.pop()
        found.append(current)
        for task in Path(f"/proc/{current}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                waiting += [int(child) for child in task.read_text().split()]
    return found


def _proportional(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        shares = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        if shares:
            return int(shares[1]) * 1024
    with contextlib.suppress(OSError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None


@dataclass
class Monitor:
    """Samples one server while its context is open.

    Attributes:
        url: of `/metrics`; None if the server has none.
        pid: of the server's main process, where it runs on this machine.
        clock: seconds since the start of the run.
    """

    url: str | None
    pid: int | None
    clock: Callable[[], float]
    samples: list[Sample] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    kv_blocks: int | None = None
    block_size: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    _before: dict[str, float] = field(default_factory=dict)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None
    _session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=READ_TIMEOUT_S)
        self._session = aiohttp.ClientSession(timeout=timeout, headers=self.headers)
        text = await self._read()
        self._before = parse(text)
        self.kv_blocks, self.block_size = cache_size(text)
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None
        assert self._session is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self.counters = growth(self._before, parse(await self._read()))
        await self._session.close()

    def sample_now(self) -> None:
        """Take a sample now."""
        self._wake.set()

    async def _watch(self) -> None:
        while True:
            await self._sample()
            await asyncio.sleep(MIN_INTERVAL_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), INTERVAL_S - MIN_INTERVAL_S)
            self._wake.clear()

    async def _sample(self) -> None:
        at = self.clock()
        series = parse(await self._read())
        memory = None if self.pid is None else await asyncio.to_thread(memory_of, self.pid)
        self.samples.append(
            Sample(
                at_s=at,
                kv_use=series.get("vllm:kv_cache_usage_perc"),
                running=series.get("vllm:num_requests_running"),
                waiting=series.get("vllm:num_requests_waiting"),
                tower_cache_bytes=series.get("ep_serve_tower_cache_bytes"),
                memory_bytes=memory,
            )
        )

    async def _read(self) -> str:
        """The metrics page, or nothing: a server too busy to answer is not a failed run."""
        if self.url is None:
            return ""
        assert self._session is not None
        try:
            async with self._session.get(self.url) as response:
                return await response.text() if response.status == 200 else ""
        except (aiohttp.ClientError, OSError, TimeoutError):
            return ""
