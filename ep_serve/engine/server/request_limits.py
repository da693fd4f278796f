"""Bounds of requests, on every route of vLLM's server that generates.

- `RequestLimits` (an ASGI middleware) reads the body of a request before anything else does, within
  bounds on its memory (`request_body.py`): numbers must be finite and have 64 bits, fields be
  within the bounds of `contract/generation.py`.
- `SamplingParams._validate_structured_outputs`: what binds an answer is checked once more, where
  all routes meet: vLLM makes some of it itself, of tools.
- `BaseRenderer.render_cmpl_async`: rendered prompts are searched for media tokens;
  `openai_patch.py` does so with those of chats, `tokenization.py` with those of scoring.
- `vllm.connections._append_chunk`: the bytes of downloads are counted (`request_memory.py`).
- `AsyncLLM.generate`: why a grammar failed (`grammar_guard.py`) is reported as a client's error.

The others are patches (see `patches.py`), because vLLM has no hook there.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from contextlib import aclosing, suppress
from dataclasses import asdict
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import pydantic_core
from vllm import connections
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.renderers.base import BaseRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from ep_serve.contract.errors import FieldError
from ep_serve.contract.generation import check_generation
from ep_serve.contract.json_schemas import RequestCosts
from ep_serve.contract.structured_outputs import check_constraint
from ep_serve.engine.input.media_tokens import refuse_media_tokens
from ep_serve.engine.input.request_memory import RequestMemory, fetching, request_memory
from ep_serve.engine.server.request_body import RequestBody
from ep_serve.engine.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.types import ASGIApp, Receive, Scope, Send
    from vllm.outputs import RequestOutput

    from ep_serve.engine.server.patching import Patch

_original_structured = SamplingParams._validate_structured_outputs
_original_render = BaseRenderer.render_cmpl_async
_original_append_chunk = connections._append_chunk
_original_generate = AsyncLLM.generate

DISCARD_SECONDS = 5
"""What is left of a body that was refused is read for so long at most."""

_TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}
"""Types of errors, as vLLM's server names them."""

_MAY_BE_TOO_LARGE = re.compile(rb"NaN|Infinity|\d{19}|\d[eE]\+?\d{3}")
"""Found in every JSON text with a number that is not finite or has over 64 bits, and in others."""


# -- bodies -------------------------------------------------------------------------------------


class RequestLimits:
    """Refuse bodies that take too much memory, are not JSON, or exceed another bound."""

    def __init__(self, app: ASGIApp, memory: RequestMemory = request_memory) -> None:
        self.app = app
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = RequestBody(self._memory)
        try:
            try:
                await self._check(body, scope, receive)
            except FieldError as error:
                await _refuse(send, HTTPStatus.BAD_REQUEST, str(error), error.field)
            except GracefulHTTPError as error:
                body.release()
                unread = None if body.is_complete else receive
                await _refuse(send, error.http_status, str(error), unread=unread)
            else:
                await self.app(scope, body.replayed(receive), send)
        finally:
            body.release()

    async def _check(self, body: RequestBody, scope: Scope, receive: Receive) -> None:
        """Read and check the body.

        Raises:
            FieldError: names the field, the limit and the value (HTTP 400).
            GracefulHTTPError: it takes too much memory (HTTP 413 or 503).
        """
        data = await body.read(scope, receive)
        if scope["path"].endswith("/scale_elastic_ep"):
            _check_elastic(scope)
        if data and _is_json(scope):
            check_body(scope["path"], data, _max_n(scope))


def check_body(path: str, body: bytes, max_n: int) -> None:
    """Check the JSON body of a request.

    Args:
        path: of the route.
        body: not empty.
        max_n: the server's limit of answers to one request.

    Raises:
        FieldError: names the field, the limit and the value.
    """
    try:
        fields = pydantic_core.from_json(body, cache_strings="none")
    except ValueError as error:
        raise FieldError("body", f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        return
    if _MAY_BE_TOO_LARGE.search(body):
        for name, value in fields.items():
            if not _fits(value):
                raise FieldError(name[:64], "holds a number that is not finite or over 64 bits")
    check_generation(fields, max_n)
    parameters = fields.get("sampling_params")
    if isinstance(parameters, dict):
        check_generation(parameters, max_n)
    if path.endswith("/inference/v1/generate") and fields.get("features") is not None:
        raise FieldError(
            "features", "is not accepted: media of this model are processed where they are served"
        )


def _fits(value: Any) -> bool:
    """Whether all numbers are finite, and integers such as can be sent to the engine."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, float) and not math.isfinite(item):
            return False
        if isinstance(item, int) and not -(2**63) <= item < 2**64:
            return False
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
    return True


def _is_json(scope: Scope) -> bool:
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    return not types or any(b"json" in value.lower() for value in types)


def _max_n(scope: Scope) -> int:
    config = scope["app"].state.vllm_config.model_config
    return Settings.of(config).engine.max_n


def _check_elastic(scope: Scope) -> None:
    if not scope["app"].state.vllm_config.parallel_config.enable_elastic_ep:
        raise FieldError(
            "new_data_parallel_size",
            "is fixed: this server was started without --enable-elastic-ep",
        )


async def _refuse(
    send: Send,
    status: HTTPStatus,
    message: str,
    field: str | None = None,
    unread: Receive | None = None,
) -> None:
    """Answer with an error; `unread` is where the rest of the body comes from."""
    error = {"message": message, "type": _TYPES.get(status, status.phrase), "param": field}
    content = json.dumps({"error": {**error, "code": status.value}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"1"))
    if unread is not None:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status.value, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": True})
    if unread is not None:
        await _discard(unread)
    await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    """Read on for a while: most clients look for an answer once they have sent all.

    A connection that is closed amid a body is reset, and the answer may be lost.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await receive()).get("more_body"):
                pass


# -- where all routes meet ----------------------------------------------------------------------


def _validate_structured_outputs(self: SamplingParams, *args: Any, **kwargs: Any) -> None:
    if self.structured_outputs is not None:
        try:
            check_constraint("structured_outputs", asdict(self.structured_outputs), RequestCosts())
        except FieldError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from None
    _original_structured(self, *args, **kwargs)


async def _render_cmpl_async(self: BaseRenderer, *args: Any, **kwargs: Any) -> Any:
    prompts = await _original_render(self, *args, **kwargs)
    refuse_media_tokens(prompts, self.tokenizer, "prompt")
    return prompts


def _append_chunk(chunks: list[bytes], chunk: bytes, *args: Any) -> int:
    if (share := fetching.get()) is not None:
        share.take(len(chunk))
    received: int = _original_append_chunk(chunks, chunk, *args)
    return received


def _generate(
    self: AsyncLLM, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[RequestOutput, None]:
    results = _original_generate(self, prompt, sampling_params, *args, **kwargs)
    if getattr(sampling_params, "structured_outputs", None) is None:
        return results
    return _explained(results)


async def _explained(
    results: AsyncGenerator[RequestOutput, None],
) -> AsyncGenerator[RequestOutput, None]:
    """The outputs of a request, until its grammar fails.

    Raises:
        VLLMValidationError: says why (HTTP 400).
    """
    async with aclosing(results):
        async for result in results:
            for output in result.outputs:
                if output.finish_reason == "error" and isinstance(output.stop_reason, str):
                    raise VLLMValidationError(
                        f"The schema or grammar of the answer {output.stop_reason}.",
                        parameter="structured_outputs",
                    )
            yield result


PATCHES: tuple[Patch, ...] = (
    (SamplingParams, "_validate_structured_outputs", _validate_structured_outputs),
    (BaseRenderer, "render_cmpl_async", _render_cmpl_async),
    (connections, "_append_chunk", _append_chunk),
    (AsyncLLM, "generate", _generate),
)
"""Installed by `patches.py`."""
