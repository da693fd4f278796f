"""Graceful shutdown: running requests finish, or end with an error.

vLLM 0.32 drains inside the engine process only: its API process drops what the engine sent last
when the engine exits before those messages were read, so the end of a stream can be lost, and a
request whose media are still being decoded is not waited for at all. Here the API process waits
first, while everything behind it still works, and stops the engine when nothing runs any more.

- `DrainMiddleware` counts the requests and refuses new ones once the server is stopping. It is
  added where vLLM adds its own middleware, so that no option is needed.
- `AsyncLLM.shutdown`, which vLLM's server calls upon SIGTERM, is wrapped.

Both are patches (see `patches.py`) because the server has no hook there;
`tests/engine/test_upstream.py` fails when that changes upstream.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.launchers import app as vllm_app
from vllm.logger import init_logger
from vllm.v1.engine.async_llm import AsyncLLM

from ep_serve.engine.server import patching
from ep_serve.engine.server.request_limits import RequestLimits

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ep_serve.engine.server.patching import Patch

POLL_SECONDS = 0.05
TELL_SECONDS = 3.0
"""Requests are aborted this long before the time-out, so that clients get an error."""

ENGINE_EXIT_SECONDS = 5.0
"""Least time that the engine's processes have to exit."""

logger = init_logger(__name__)

_original_shutdown = AsyncLLM.shutdown
_original_middleware = vllm_app.init_entrypoints_middleware


class _Requests:
    """The HTTP requests of this process; changed on its event loop, read by the draining thread."""

    def __init__(self) -> None:
        self.running = 0
        self.stopping = threading.Event()


_requests = _Requests()


class DrainMiddleware:
    """Count requests; answer new ones with 503 when the server is stopping."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/metrics":
            await self.app(scope, receive, send)
        elif _requests.stopping.is_set():
            await _refuse(send)
        else:
            _requests.running += 1
            try:
                await self.app(scope, receive, send)
            finally:
                _requests.running -= 1


async def _refuse(send: Send) -> None:
    message = "The server is stopping and takes no more requests."
    error = {"message": message, "type": "ServiceUnavailableError", "param": None, "code": 503}
    headers = [
        (b"content-type", b"application/json"),
        (b"connection", b"close"),
        (b"retry-after", b"1"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


def _init_middleware(args: Any, app: Any, supported_tasks: Any) -> None:
    patching.check()
    app.add_middleware(RequestLimits)  # innermost: bodies of clients without a key are not read
    _original_middleware(args, app, supported_tasks)
    app.add_middleware(DrainMiddleware)


def _shutdown(self: AsyncLLM, timeout: float | None = None) -> None:
    # vLLM calls it from a thread upon SIGTERM, and again on the event loop when all is over.
    if timeout is not None and not _requests.stopping.is_set() and not _on_event_loop():
        _requests.stopping.set()
        deadline = time.monotonic() + timeout
        _drain(self, deadline - TELL_SECONDS)
        timeout = max(deadline - time.monotonic(), ENGINE_EXIT_SECONDS)
    _original_shutdown(self, timeout=timeout)


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _drain(engine: AsyncLLM, deadline: float) -> None:
    """Wait for the running requests; abort those that are left at the deadline."""
    if _wait(engine, deadline) or engine.errored:
        return
    states: dict[str, Any] = engine.output_processor.request_states
    handler: asyncio.Task[None] | None = engine.output_handler
    logger.warning("%d requests run for too long and are aborted", len(states))
    abort_deadline = time.monotonic() + TELL_SECONDS
    while handler is not None and not engine.errored and time.monotonic() < abort_deadline:
        # More than once: a request whose media were being decoded may have started meanwhile.
        abort = engine.abort(list(states), internal=True)
        asyncio.run_coroutine_threadsafe(abort, handler.get_loop())
        if _wait(engine, time.monotonic() + 10 * POLL_SECONDS):
            return


def _wait(engine: AsyncLLM, deadline: float) -> bool:
    """Wait until nothing runs; False if the deadline came first, or the end of the engine."""
    while _requests.running or engine.get_num_unfinished_requests():
        if engine.errored or time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


PATCHES: tuple[Patch, ...] = (
    (AsyncLLM, "shutdown", _shutdown),
    (vllm_app, "init_entrypoints_middleware", _init_middleware),
)
