"""The routes `/v1/files`: media that are uploaded once and then referenced by id."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from fastapi.requests import Request
from starlette.responses import Response

from ep_serve.gateway import context, gateway
from ep_serve.gateway.api.openapi import CONTENT_OPENAPI, UPLOAD_OPENAPI
from ep_serve.gateway.body.multipart import Form, disposition
from ep_serve.gateway.body.reader import check_content_type, stream
from ep_serve.gateway.errors import invalid
from ep_serve.gateway.keys import quota_tenant
from ep_serve.gateway.media.sending import MediaResponse

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from ep_serve.gateway.gateway import Gateway
    from ep_serve.gateway.keys import Key
    from ep_serve.gateway.media.store.index import File

router = APIRouter(prefix="/v1/files")

_FORM_OVERHEAD = 64 * 1024
"""Bytes of a form besides its file."""
_UPLOAD_MEMORY = 256 * 1024
"""Bytes of an upload that are buffered in memory."""


async def _authenticate(request: Request) -> tuple[Gateway, Key]:
    parts = gateway.get_gateway(request)
    key = parts.keys.authenticate(request.headers.get("authorization"))
    context.get_context(request.scope).key_name = key.name
    await parts.limits.count_request(key)
    return parts, key


@router.post("", openapi_extra=UPLOAD_OPENAPI)
async def upload(request: Request) -> dict[str, Any]:
    """Upload an image, audio or video file."""
    parts, key = await _authenticate(request)
    check_content_type(request, "multipart/form-data")
    form = Form(request.headers["content-type"])
    limit = parts.settings.media.max_bytes + _FORM_OVERHEAD
    tenant = quota_tenant(key, request.scope)
    with parts.limits.running(key), parts.bodies.quota.reserve(tenant) as memory:
        memory.grow(_UPLOAD_MEMORY)
        async with (
            parts.media.store.receive(tenant) as incoming,
            aclosing(stream(request, limit, parts.settings.request)) as chunks,
        ):
            async for chunk in chunks:
                if data := form.feed(chunk):
                    await parts.media.receive(incoming, data, key, "upload")
            if not form.complete:
                raise invalid("The multipart body is cut short.", code="invalid_form")
            if form.file_name is None:
                raise invalid("The form has no field 'file'.", "file")
            purpose = form.fields.get("purpose", "user_data")
            if not purpose.isascii() or not 0 < len(purpose) <= 64:
                raise invalid("purpose must be a word of up to 64 characters.", "purpose")
            async with asyncio.timeout(parts.settings.request_timeout_s):
                file = await parts.media.add_file(incoming, key, form.file_name, purpose)
    return _file_object(file)


@router.get("")
async def list_files(
    request: Request,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> dict[str, Any]:
    """List the files of the tenant, newest first."""
    parts, key = await _authenticate(request)
    files = await parts.media.store.files(key.owner, after, limit + 1)
    shown = [_file_object(file) for file in files[:limit]]
    return {
        "object": "list",
        "data": shown,
        "has_more": len(files) > limit,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


@router.get("/{file_id}")
async def get_file(request: Request, file_id: str) -> dict[str, Any]:
    """Return the metadata of a file."""
    parts, key = await _authenticate(request)
    return _file_object(await parts.media.store.file(key.owner, file_id))


@router.get("/{file_id}/content", response_model=None, openapi_extra=CONTENT_OPENAPI)
async def get_content(request: Request, file_id: str) -> Response:
    """Download a file."""
    parts, key = await _authenticate(request)
    return _FileContentResponse(parts, key, await parts.media.store.file(key.owner, file_id))


@router.delete("/{file_id}")
async def delete_file(request: Request, file_id: str) -> dict[str, Any]:
    """Delete a file."""
    parts, key = await _authenticate(request)
    await parts.media.store.delete_file(key.owner, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


class _FileContentResponse(Response):
    """Sends a file and pins it in the store meanwhile."""

    def __init__(self, parts: Gateway, key: Key, file: File) -> None:
        self._gateway = parts
        self._key = key
        self._file = file
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts, file = self._gateway, self._file
        # Browsers must not render content that a client chose.
        headers = {"content-disposition": disposition(file.name)}
        with parts.limits.running(self._key):
            tenant = quota_tenant(self._key, scope)
            async with parts.media.store.pinned(file.digest, tenant) as path:
                pause_s = parts.settings.request.body_timeout_s
                await MediaResponse(path, pause_s, headers)(scope, receive, send)


def _file_object(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.nbytes,
        "created_at": file.created,
        "expires_at": file.expires,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }
