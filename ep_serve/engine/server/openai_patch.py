"""Patches vLLM's chat API: request fields and `usage.reduction`.

vLLM 0.32. Installed by `patches.py` in processes that serve our architecture.

1. Request fields of ours (`settings.REQUEST_FIELDS`) in the body of `/v1/chat/completions`: vLLM
   accepts unknown fields and drops them. `OnlineRenderer.preprocess_chat` is wrapped: it checks
   them and moves them into `mm_processor_kwargs`, and the check that refuses these kwargs from
   clients (`validate_request_mm_kwargs`) lets exactly ours pass, because the server's settings
   bound them. It also refuses content parts with several contents, of which vLLM would ignore all
   but one, and media tokens in the rendered prompt: they would be placeholders.
2. `usage.reduction` in responses: `OpenAIServingChat.chat_completion_full_generator` and
   `chat_completion_stream_generator` are wrapped; they add the object to the usage that vLLM built,
   and the reason to the error of a request whose sieve failed. `OutputProcessor.process_outputs`
   is wrapped to take what both tell out of the engine's outputs.

`tests/engine/test_upstream.py` fails when one of these changes upstream.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.renderers import online_renderer
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.output_processor import OutputProcessor

from ep_serve.contract.content_parts import content_fields
from ep_serve.engine.input.media_ids import scoped
from ep_serve.engine.input.media_tokens import refuse_media_tokens
from ep_serve.engine.server import event_loop_lag, reduction_reports
from ep_serve.engine.server.reduction_reports import RequestReport
from ep_serve.engine.settings import OPTIONS_KEY, REQUEST_FIELDS, Settings, hide_sound_field

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from vllm.outputs import RequestOutput

    from ep_serve.engine.server.patching import Patch

_REPORT = "_ep_serve_report"
"""Attribute of a request object, from its rendering to its response."""

_original_preprocess = OnlineRenderer.preprocess_chat
_original_validate = online_renderer.validate_request_mm_kwargs
_original_init = OpenAIServingChat.__init__
_original_full = OpenAIServingChat.chat_completion_full_generator
_original_stream = OpenAIServingChat.chat_completion_stream_generator
_original_process = OutputProcessor.process_outputs


# -- requests -----------------------------------------------------------------------------------


async def _preprocess_chat(
    self: OnlineRenderer, request: Any, messages: Sequence[Any], *args: Any, **kwargs: Any
) -> Any:
    extra = request.model_extra or {}
    own = {name: extra[name] for name in REQUEST_FIELDS if name in extra}
    if request.mm_processor_kwargs or own:
        own = hide_sound_field({**(request.mm_processor_kwargs or {}), **own})
        request.mm_processor_kwargs = own
    options = Settings.of(self.model_config).merge(own)
    request.media_io_kwargs = {
        **(request.media_io_kwargs or {}),
        OPTIONS_KEY: options.model_dump(),
    }
    _check_parts(messages)
    messages = scoped(messages, getattr(request, "cache_salt", None))
    try:
        conversation, engine_inputs = await _original_preprocess(
            self, request, messages, *args, **kwargs
        )
    except RecursionError:  # JSON in a string, as the arguments of tool calls
        raise VLLMValidationError(
            "The messages hold JSON that is nested too deeply.", parameter="messages"
        ) from None
    refuse_media_tokens(engine_inputs, self.renderer.tokenizer, "messages")
    reduction = engine_inputs[0].get("reduction")
    if reduction is not None:
        object.__setattr__(request, _REPORT, RequestReport(reduction))
    return conversation, engine_inputs


def _check_parts(messages: Sequence[Any]) -> None:
    for index, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, dict) else None
        for number, part in enumerate(parts if isinstance(parts, list) else []):
            if isinstance(part, dict) and len(fields := content_fields(part)) > 1:
                raise VLLMValidationError(
                    f"messages[{index}].content[{number}] must have one content "
                    f"(got {', '.join(fields)[:200]}).",
                    parameter=f"messages[{index}].content[{number}]",
                )


def _validate_request_mm_kwargs(
    *, mm_processor_kwargs: Any, media_io_kwargs: Any, trust_request_mm_kwargs: bool
) -> None:
    ours = {*REQUEST_FIELDS, "sound", OPTIONS_KEY}
    _original_validate(
        mm_processor_kwargs=_without(ours, mm_processor_kwargs),
        media_io_kwargs=_without(ours, media_io_kwargs),
        trust_request_mm_kwargs=trust_request_mm_kwargs,
    )


def _without(names: set[str], kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    return {name: value for name, value in (kwargs or {}).items() if name not in names} or None


# -- responses ----------------------------------------------------------------------------------


def _serving_init(self: OpenAIServingChat, engine_client: Any, *args: Any, **kwargs: Any) -> None:
    _original_init(self, engine_client, *args, **kwargs)
    self._ep_serve_watch = asyncio.get_running_loop().create_task(event_loop_lag.watch())


async def _full_generator(
    self: OpenAIServingChat,
    request: Any,
    results: AsyncGenerator[Any, None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    report: RequestReport | None = getattr(request, _REPORT, None)
    if report is None:
        return await _original_full(self, request, results, *args, **kwargs)
    async with aclosing(_with_reason(results, report)) as explained:
        response = await _original_full(self, request, explained, *args, **kwargs)
    if isinstance(response, ChatCompletionResponse):
        response.usage.reduction = report.usage()  # the model allows extra fields
    return response


async def _stream_generator(
    self: OpenAIServingChat,
    request: Any,
    results: AsyncGenerator[Any, None],
    *args: Any,
    **kwargs: Any,
) -> AsyncGenerator[str, None]:
    report: RequestReport | None = getattr(request, _REPORT, None)
    if report is not None:
        results = _with_reason(results, report)
    async with (
        aclosing(results),
        aclosing(_original_stream(self, request, results, *args, **kwargs)) as chunks,
    ):
        async for chunk in chunks:
            yield chunk if report is None else _with_usage(chunk, report)


async def _with_reason(
    results: AsyncGenerator[RequestOutput, None], report: RequestReport
) -> AsyncGenerator[RequestOutput, None]:
    """The outputs of a request, until one says that it failed.

    Raises:
        GenerationError: with the reason, where vLLM would only say "Internal server error".
    """
    async with aclosing(results):
        async for result in results:
            failed = any(output.finish_reason == "error" for output in result.outputs)
            if failed and report.error:
                raise GenerationError(report.error)
            yield result


def _with_usage(chunk: str, report: RequestReport) -> str:
    """Add the reduction to the chunk that closes a stream with its usage."""
    if '"choices":[]' not in chunk or '"usage"' not in chunk:
        return chunk
    body = json.loads(chunk.removeprefix("data: "))
    body["usage"]["reduction"] = report.usage()
    return f"data: {json.dumps(body, separators=(',', ':'), ensure_ascii=False)}\n\n"


def _process_outputs(
    self: OutputProcessor, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
) -> Any:
    reduction_reports.receive(engine_core_outputs)
    return _original_process(self, engine_core_outputs, *args, **kwargs)


PATCHES: tuple[Patch, ...] = (
    (OnlineRenderer, "preprocess_chat", _preprocess_chat),
    (online_renderer, "validate_request_mm_kwargs", _validate_request_mm_kwargs),
    (OpenAIServingChat, "__init__", _serving_init),
    (OpenAIServingChat, "chat_completion_full_generator", _full_generator),
    (OpenAIServingChat, "chat_completion_stream_generator", _stream_generator),
    (OutputProcessor, "process_outputs", _process_outputs),
)
"""Installed by `patches.py`."""
