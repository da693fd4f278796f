"""Serve media to engines on the internal port, by URLs that are valid during a request.

URLs contain a token of 256 random bits, so that they cannot be guessed by others who reach the
port.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from ep_serve.gateway.media.sending import MediaResponse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from starlette.requests import Request


class MediaServer:
    """An ASGI application with temporary URLs of media; readers may pause for `pause_s`."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self.base_url = ""
        """URL of `app` for engines, set once its port is known."""
        self._paths: dict[str, Path] = {}
        self.app = Starlette(routes=[Route("/media/{token}", self._serve, methods=["GET"])])

    @contextmanager
    def publish(self, path: Path) -> Iterator[str]:
        """Yield a URL of a file that is valid inside the block."""
        token = secrets.token_urlsafe(32)
        self._paths[token] = path
        try:
            yield f"{self.base_url}/media/{token}"
        finally:
            del self._paths[token]

    async def _serve(self, request: Request) -> Response:
        path = self._paths.get(request.path_params["token"])
        if path is None:
            return Response(status_code=404)
        return MediaResponse(path, self._pause_s)
