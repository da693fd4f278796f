"""Media tokens in rendered prompts: only the chat template may have written them, for media.

A text or a token id of a client can become one in many ways: chat templates join texts, vLLM strips
some, arguments of tool calls are JSON in a string. So the tokens are looked at, not the texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from ep_serve.contract.media_tokens import MEDIA_TOKENS
from ep_serve.layout import PlaceholderError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def refuse_media_tokens(
    prompts: Sequence[Mapping[str, Any]], tokenizer: Any, parameter: str
) -> None:
    """Refuse rendered prompts that have media tokens but no media.

    Those with media have been counted, see `count_media_tokens`.

    Raises:
        VLLMValidationError: names the token (HTTP 400).
    """
    ids = media_token_ids(tokenizer)
    for prompt in prompts:
        given = prompt.get("prompt_token_ids") or ()
        if prompt["type"] == "token" and (found := ids.keys() & set(given)):
            raise VLLMValidationError(
                f"The prompt contains the token {ids[min(found)]}, which marks media and must not "
                "be written by a client.",
                parameter=parameter,
            )


def media_token_ids(tokenizer: Any) -> dict[int, str]:
    """The media tokens by their ids, those that a tokenizer has."""
    vocabulary = tokenizer.get_added_vocab() if tokenizer is not None else {}
    return {vocabulary[token]: token for token in MEDIA_TOKENS if token in vocabulary}


def count_media_tokens(prompt: Sequence[int], media: Mapping[str, int], tokenizer: Any) -> None:
    """Refuse a prompt with other placeholders than its media, or more tokens around them.

    Args:
        prompt: token ids, one placeholder for each medium.
        media: how many of each modality there are.
        tokenizer: has the ids.

    Raises:
        PlaceholderError: names the token (HTTP 400).
    """
    of = {modality: media.get(modality, 0) for modality in ("video", "audio", "image")}
    pictures = of["video"] + of["image"]
    most = {"<|vision_bos|>": pictures, "<|vision_eos|>": pictures}
    most |= {"<|audio_bos|>": of["audio"], "<|audio_eos|>": of["audio"]}
    exact = {f"<|{modality.upper()}|>": count for modality, count in of.items()}
    for token_id, token in media_token_ids(tokenizer).items():
        found = prompt.count(token_id)
        allowed = exact.get(token, most.get(token, 0))
        if found > allowed or (found < allowed and token in exact):
            raise PlaceholderError(
                f"The prompt has {found} tokens {token} for {allowed} media of that kind. It marks "
                "media and must not be written by a client."
            )
