"""The FastAPI application of the public port."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from starlette.responses import JSONResponse, Response

from ep_serve.gateway import context, errors, gateway
from ep_serve.gateway.api import chat, files
from ep_serve.gateway.api.middleware import ContextMiddleware
from ep_serve.gateway.api.openapi import ERRORS
from ep_serve.gateway.errors import ApiError, invalid
from ep_serve.gateway.gateway import Gateway
from ep_serve.gateway.playground import routes as playground

_SHOWN = ("id", "object", "created", "owned_by", "max_model_len")
"""Public fields of a model; engines also report paths of its files."""


def create_app(parts: Gateway) -> FastAPI:
    """Create the application of an open gateway."""
    app = FastAPI(
        title="ep-serve gateway",
        openapi_url=None,  # and with it no `/docs` and `/redoc`
        responses=ERRORS,
        redirect_slashes=False,
    )
    app.state.gateway = parts
    errors.add_exception_handlers(app)
    app.add_exception_handler(RequestValidationError, _invalid_query)
    app.include_router(chat.router)
    app.include_router(files.router)
    if parts.settings.playground.enabled:
        app.include_router(playground.create_router())
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", get_model, methods=["GET"])
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/ready", ready, methods=["GET"], response_model=None)
    app.add_middleware(ContextMiddleware, parts=parts)
    return app


async def health() -> dict[str, str]:
    """Liveness: the process is running."""
    return {"status": "ok"}


async def ready(request: Request) -> Response:
    """Readiness: an engine is available and the gateway is not draining."""
    parts = gateway.get_gateway(request)
    if parts.is_ready:
        return JSONResponse({"status": "ready"})
    message = "The gateway is shutting down." if parts.is_draining else "No engine is available."
    return ApiError(503, message, code="not_ready").response()


async def list_models(request: Request) -> dict[str, Any]:
    """List the models that the key may use."""
    return {"object": "list", "data": await _models(request)}


async def get_model(request: Request, model: str) -> dict[str, Any]:
    """Return a model."""
    for entry in await _models(request):
        if entry["id"] == model:
            return entry
    raise ApiError(404, "The model does not exist here.", code="model_not_found", param="model")


async def _models(request: Request) -> list[dict[str, Any]]:
    parts = gateway.get_gateway(request)
    key = parts.keys.authenticate(request.headers.get("authorization"))
    context.get_context(request.scope).key_name = key.name
    await parts.limits.count_request(key)
    found: dict[str, dict[str, Any]] = {}
    for upstream in parts.upstreams.all:
        if upstream.is_healthy:
            for name, entry in (upstream.models or {}).items():
                found.setdefault(name, {item: entry[item] for item in _SHOWN if item in entry})
    return [found[name] for name in sorted(found) if key.models is None or name in key.models]


async def _invalid_query(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return invalid(f"{name}: {first['msg']}.", name).response()
