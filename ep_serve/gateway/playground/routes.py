"""Serve the static files of the playground with a strict security policy.

The page is an ordinary API client that uses the key its user enters, so its files are public. All
links are relative, so that it works below any path prefix of a proxy.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.requests import Request
from starlette.responses import RedirectResponse, Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PATH = "/playground"
_INDEX = "index.html"
_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' blob:",  # blob: URLs are files that the user selected or recorded
    "media-src": "blob:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "permissions-policy": "camera=(self), microphone=(self), geolocation=(), display-capture=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Revalidated every time, so that a page never runs with scripts of another version.
    "cache-control": "no-cache",
}


def create_router() -> APIRouter:
    """Create a route for each file of the page."""
    router = APIRouter(include_in_schema=False)
    for file in resources.files(__package__).joinpath("page").iterdir():
        path = PATH if file.name == _INDEX else f"{PATH}/{file.name}"
        kind = _TYPES[file.name.rpartition(".")[2]]
        router.add_api_route(path, _static_file(file.read_bytes(), kind), methods=["GET"])
    router.add_api_route(f"{PATH}/", _without_slash, methods=["GET"])
    return router


def _static_file(body: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**HEADERS, "content-type": kind, "etag": tag}

    async def give(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    return give


async def _without_slash() -> Response:
    # Relative, as only the proxy in front knows the prefix.
    return RedirectResponse(f"..{PATH}")
