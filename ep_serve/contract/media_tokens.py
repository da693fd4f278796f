"""Find special tokens that mark media in a prompt; only the chat template may write them."""

from __future__ import annotations

from collections.abc import Iterable

MEDIA_TOKENS = (
    "<|VIDEO|>",
    "<|AUDIO|>",
    "<|IMAGE|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
)

_SPECIAL = "<|"


def find_media_token(text: str) -> str | None:
    """Return the first of `MEDIA_TOKENS` that the text contains, or None."""
    if _SPECIAL not in text:
        return None
    return next((token for token in MEDIA_TOKENS if token in text), None)


def find_split_media_token(pieces: Iterable[str]) -> str | None:
    """Return a media token that results from joining pieces of text, or None.

    Chat templates concatenate the texts of parts and messages. vLLM strips some of them first, so
    the pieces are stripped here too.
    """
    return find_media_token("".join(piece.strip() for piece in pieces))
