"""The CPU side of a prompt: expansion, positions and budgets, known before any tensor exists.

Numpy only. Describe the media of a request (`Video`, `Audio`, `Image`), call `build_layout`, then
`keep_count` for the number of tokens to keep.
"""

from __future__ import annotations

from ep_serve.layout.budget import keep_count, spread
from ep_serve.layout.build import Layout, PlaceholderError, build_layout
from ep_serve.layout.kinds import Kind
from ep_serve.layout.media import (
    Audio,
    Image,
    MediumShape,
    Video,
    audio_token_count,
    video_tokens,
)
from ep_serve.layout.tokens import MediaTokens

__all__ = [
    "Audio",
    "Image",
    "Kind",
    "Layout",
    "MediaTokens",
    "MediumShape",
    "PlaceholderError",
    "Video",
    "audio_token_count",
    "build_layout",
    "keep_count",
    "spread",
    "video_tokens",
]
