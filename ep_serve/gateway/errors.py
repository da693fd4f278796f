"""Errors in OpenAI's JSON format, for all routes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pydantic_core
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.types import Scope

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An error that is sent to the client.

    Args:
        status: HTTP status.
        message: a sentence without secrets or internal addresses.
        code: a machine-readable error code.
        param: the invalid field of the request, if any.
        retry_after: seconds until a retry makes sense, for the header `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "api_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after + 0.5)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(
            pydantic_core.to_json(self.body), self.status, headers, media_type="application/json"
        )


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400 for an invalid request."""
    return ApiError(400, message, code=code, param=param)


def too_many_media(limit: int, found: int) -> ApiError:
    """400 for more media than a request may have."""
    return invalid(f"A request may have at most {limit} media (got at least {found}).", "messages")


def internal_error() -> ApiError:
    """500 without details."""
    return ApiError(500, "The gateway failed to process the request.", code="internal_error")


def add_exception_handlers(app: FastAPI) -> None:
    """Make an application send all errors in this format."""

    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return ApiError(404, "The path does not exist.", code="unknown_path").response()
        if error.status_code == 405:
            message = f"{request.method} is not allowed on this path."
            response = ApiError(405, message, code="method_not_allowed").response()
            response.headers["allow"] = ", ".join(sorted(_methods(app, request.scope)))
            return response
        return ApiError(error.status_code, error.detail).response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)


def _methods(app: FastAPI, scope: Scope) -> set[str]:
    """Return the methods of all routes of a path; Starlette reports those of the first only."""
    routes = [route for route in app.routes if isinstance(route, Route)]
    found = [route.methods or () for route in routes if route.matches(scope)[0] != Match.NONE]
    return {method for methods in found for method in methods}
