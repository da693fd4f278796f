"""How an engine gets a medium: a URL on a port of its own that works as long as the request.

The port is for engines only; a token of 256 random bits names the medium, so that whoever reaches
the port by mistake finds nothing.
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


class Lender:
    """Lends media to engines, which may pause for `pause_s` while they read."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self.base_url = ""
        """Where engines find `app`; set once its port is known."""
        self._lent: dict[str, Path] = {}
        self.app = Starlette(routes=[Route("/media/{token}", self._serve, methods=["GET"])])

    @contextmanager
    def lent(self, path: Path) -> Iterator[str]:
        """The URL of a file; it works inside the block."""
        token = secrets.token_urlsafe(32)
        self._lent[token] = path
        try:
            yield f"{self.base_url}/media/{token}"
        finally:
            del self._lent[token]

    async def _serve(self, request: Request) -> Response:
        path = self._lent.get(request.path_params["token"])
        if path is None:
            return Response(status_code=404)
        return MediaResponse(path, self._pause_s)
