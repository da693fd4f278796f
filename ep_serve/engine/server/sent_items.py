"""Which processed items the engine has: those of requests that reached it.

vLLM 0.32 notes an item as sent when it has been processed, and sends later requests with it without
data. A request that is refused after that, or whose client goes away, never reaches the engine, and
the next one with the same item would fail there. So an item is noted when its request was added.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from ep_serve.engine.input.processor import UNSENT

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalKwargsItem

    from ep_serve.engine.server.patching import Patch

_original_add_async = AsyncLLM.add_request
_original_add = LLMEngine.add_request


async def _add_async(
    self: AsyncLLM, request_id: str, prompt: Any, *args: Any, **kwargs: Any
) -> Any:
    queue = await _original_add_async(self, request_id, prompt, *args, **kwargs)
    if isinstance(prompt, dict) and UNSENT in prompt:
        # The thread that looks into the cache while it processes media.
        self.renderer._mm_executor.submit(partial(_note, self.renderer, *prompt[UNSENT]))
    return queue


def _add(self: LLMEngine, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
    added = _original_add(self, request_id, prompt, *args, **kwargs)
    if isinstance(prompt, dict) and UNSENT in prompt:
        _note(self.renderer, *prompt[UNSENT])
    return added


def _note(renderer: Any, key: str, item: MultiModalKwargsItem) -> None:
    renderer.mm_processor_cache.get_and_update_item((item, []), key)


PATCHES: tuple[Patch, ...] = (
    (AsyncLLM, "add_request", _add_async),
    (LLMEngine, "add_request", _add),
)
"""Installed by `patches.py`."""
