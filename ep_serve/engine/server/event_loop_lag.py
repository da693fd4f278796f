"""How late the API process's event loop is: every stream of the process waits for it."""

from __future__ import annotations

import asyncio
import time

from ep_serve.engine.metrics import metrics

INTERVAL_SECONDS = 0.02


async def watch() -> None:
    """Sleep again and again, and observe by how much each sleep was too long. Never returns."""
    late = metrics().loop_late
    while True:
        began = time.perf_counter()
        await asyncio.sleep(INTERVAL_SECONDS)
        late.observe(max(0.0, time.perf_counter() - began - INTERVAL_SECONDS))
