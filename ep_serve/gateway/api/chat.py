"""The route `POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.requests import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from ep_serve.gateway import context, gateway
from ep_serve.gateway.api.chat_request import ChatRequest
from ep_serve.gateway.api.openapi import CHAT_OPENAPI
from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.keys import quota_tenant
from ep_serve.gateway.upstream.relay import UpstreamRequest
from ep_serve.gateway.upstream.router import Demand

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from ep_serve.gateway.body.reader import Reservation
    from ep_serve.gateway.gateway import Gateway
    from ep_serve.gateway.keys import Key


class _PlainRoute(APIRoute):
    """A route that FastAPI documents but whose request it does not parse."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


router = APIRouter(route_class=_PlainRoute)


@router.post("/v1/chat/completions", response_model=None, openapi_extra=CHAT_OPENAPI)
async def chat_completions(request: Request) -> Response:
    """Create a chat completion for messages with text, images, audio and video."""
    parts = gateway.get_gateway(request)
    key = parts.keys.authenticate(request.headers.get("authorization"))
    context.get_context(request.scope).key_name = key.name
    await parts.limits.count_request(key)
    return _ChatResponse(request, parts, key)


class _ChatResponse(Response):
    """Processes the request while it is sent, so that a disconnect cancels it at any point."""

    def __init__(self, request: Request, parts: Gateway, key: Key) -> None:
        self._request = request
        self._gateway = parts
        self._key = key
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts, bodies, key = self._gateway, self._gateway.bodies, self._key
        tenant = quota_tenant(key, scope)
        with parts.limits.running(key), bodies.quota.reserve(tenant) as reserved:
            async with AsyncExitStack() as stack:
                spool = partial(parts.media.spool, key=key, tenant=tenant, stack=stack)
                body = await bodies.json(self._request, reserved, spool)
                async with bodies.parsing(body, reserved):
                    chat = ChatRequest(body, key, parts.settings.request)
                await while_connected(receive, self._answer(chat, reserved, scope, send))

    async def _answer(
        self, chat: ChatRequest, reserved: Reservation, scope: Scope, send: Send
    ) -> None:
        started = False

        async def tracking_send(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        seconds = self._gateway.settings.request_timeout_s
        try:
            async with asyncio.timeout(seconds):
                await self._work(chat, reserved, scope, tracking_send)
        except TimeoutError:
            if not started:
                raise ApiError(
                    504, f"The request took more than {seconds:g} s.", code="deadline_exceeded"
                ) from None

    async def _work(
        self, chat: ChatRequest, reserved: Reservation, scope: Scope, send: Send
    ) -> None:
        parts, key, now = self._gateway, self._key, context.get_context(scope)
        async with parts.media.lease(chat.parts, key, reserved.tenant) as lease:
            forward = parts.settings.forward_priority
            job = UpstreamRequest(
                content=chat.content(lease.digests),
                body=chat.encoded(
                    priority=-key.priority if forward else None,
                    cache_salt=None if parts.keys.is_anonymous else _salt(key),
                ),
                on_body_released=lambda: reserved.resize(0),
                stream=chat.stream,
                hide_usage=chat.hide_usage,
                demand=Demand(chat.model, lease.affinity, 1.0 + lease.work, key.priority),
                headers=now.upstream_headers,
                tracing=now.tracing,
                started=now.started,
                secrets=(f"{parts.media.server.base_url}/media/".encode(),),
            )
            chat.clear()
            reserved.resize(len(job.body))
            await parts.relay.answer(job, scope, send)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, and cancel it when the client disconnects."""
    this = asyncio.current_task()
    assert this is not None
    working, gone = True, False

    def stop(_: asyncio.Task[None]) -> None:
        nonlocal gone
        if working:
            gone = True
            this.cancel()

    watching = asyncio.create_task(_disconnected(receive))
    watching.add_done_callback(stop)
    try:
        await work
    except asyncio.CancelledError:
        if not gone or this.uncancel():  # cancelled for another reason
            raise
    finally:
        working = False
        watching.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _salt(key: Key) -> str:
    """Return a salt that separates the prefix caches of tenants against timing attacks."""
    return hashlib.sha256(f"ep-serve|{key.owner}".encode()).hexdigest()
