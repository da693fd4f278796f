"""File responses with a minimum transfer rate, for clients and engines."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from starlette.responses import FileResponse

from ep_serve.gateway.http.body_writer import BodyWriter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from starlette.types import Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

MIN_BYTES_PER_S = 16 * 1024
"""Slower reading counts as a pause."""


class _SlowReaderError(Exception):
    """A reader exceeded the pause limit."""


class MediaResponse(FileResponse):
    """A media file as `application/octet-stream`.

    Args:
        path: the file.
        pause_s: limit of the total pause of the reader, after which the connection is aborted.
        headers: additional headers.
    """

    def __init__(self, path: Path, pause_s: float, headers: Mapping[str, str] | None = None):
        super().__init__(path, headers=headers, media_type="application/octet-stream")
        self._pause_s = pause_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self._pause_s
        loop = asyncio.get_running_loop()

        async def timed(message: Message) -> None:
            nonlocal left
            since = loop.time()
            try:
                async with asyncio.timeout(left):
                    await send(message)
            except TimeoutError:
                raise _SlowReaderError from None
            in_time = len(message.get("body", b"")) / MIN_BYTES_PER_S
            left = min(self._pause_s, left + in_time - (loop.time() - since))

        try:
            await super().__call__(scope, receive, timed)
        except _SlowReaderError:
            logger.info("download aborted: the reader is too slow")
            writer: Any = scope.get("extensions", {}).get(BodyWriter.EXTENSION)
            if writer is not None:
                writer.abort()
                await asyncio.sleep(0)  # until the server has processed the abort
