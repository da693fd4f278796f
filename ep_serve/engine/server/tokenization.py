"""Bounds of the text that is tokenized, on every route of vLLM's server that tokenizes some.

- `TokenizeParams._text_len_check`: vLLM bounds a text that must fit the model. Of one that is to be
  truncated on the tokenizer's own side, only what can be kept is tokenized: the tokenizer would
  make objects of all that it cuts off. One that need not fit, at `/tokenize`, has at most
  `MAX_CHARS`.
- `ServingGenerativeScoring._build_prompts`: the texts have at most `MAX_CHARS` together and are not
  tokenized in the event loop. A prompt that does not fit is refused, where vLLM would score the
  part that does. The prompts are searched for media tokens.

Installed by `patches.py`, because vLLM 0.32 has no hook there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring
from vllm.exceptions import VLLMValidationError
from vllm.renderers.params import TokenizeParams

from ep_serve.engine.input.media_tokens import refuse_media_tokens

if TYPE_CHECKING:
    from ep_serve.engine.server.patching import Patch

MAX_CHARS = 1_000_000
"""Most characters of text that is tokenized without having to fit the model."""

_original_check = TokenizeParams._text_len_check
_original_scoring = ServingGenerativeScoring._build_prompts


def _text_len_check(self: TokenizeParams, tokenizer: Any, text: str) -> str:
    if self.max_input_tokens is None:
        _check_at_most(len(text), "prompt")
    elif self.truncate_prompt_tokens is not None and tokenizer is not None:
        text = _cut(self, tokenizer, text)
    return _original_check(self, tokenizer, text)


def _cut(params: TokenizeParams, tokenizer: Any, text: str) -> str:
    kept = params.truncate_prompt_tokens
    if kept is None or params.truncation_side is not None:
        return text  # vLLM cuts the text itself
    if kept < 0:
        kept = params.max_truncation_tokens or 0
    most = (kept + 1) * tokenizer.max_chars_per_token
    return text[-most:] if tokenizer.truncation_side == "left" else text[:most]


async def _build_scoring_prompts(
    self: ServingGenerativeScoring, request: Any, tokenizer: Any, max_model_len: int
) -> Any:
    texts = [text for text in (request.query, *request.items) if isinstance(text, str)]
    _check_at_most(sum(map(len, texts)), "items")
    # It never waits, so that it can run in the thread in which the renderer uses the tokenizer.
    prompts, counts = await asyncio.get_running_loop().run_in_executor(
        self.renderer._executor,
        asyncio.run,
        _original_scoring(self, request, tokenizer, max_model_len),
    )
    fitting = max_model_len - 2
    for index, prompt in enumerate(prompts):
        if len(prompt["prompt_token_ids"]) > fitting:  # vLLM may have cut off what follows
            raise VLLMValidationError(
                f"query and items[{index}] have more than {fitting} tokens together.",
                parameter=f"items[{index}]",
            )
    refuse_media_tokens(prompts, tokenizer, "items")
    return prompts, counts


def _check_at_most(chars: int, parameter: str) -> None:
    if chars > MAX_CHARS:
        raise VLLMValidationError(
            f"The text to tokenize has {chars} characters; the limit is {MAX_CHARS}.",
            parameter=parameter,
        )


PATCHES: tuple[Patch, ...] = (
    (TokenizeParams, "_text_len_check", _text_len_check),
    (ServingGenerativeScoring, "_build_prompts", _build_scoring_prompts),
)
"""Installed by `patches.py`."""
