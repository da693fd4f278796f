"""The special tokens that mark media in a prompt; the chat template alone may write them."""

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
    """Return a media token that pieces of text would spell once they are joined, or None.

    Chat templates put the texts of parts and messages behind each other, and vLLM strips some of
    them before, so white space at their ends does not keep a token apart.
    """
    return find_media_token("".join(piece.strip() for piece in pieces))
