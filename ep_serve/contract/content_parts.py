"""Content parts of chat messages: each has one content."""

from __future__ import annotations

import re
from collections.abc import Iterable

_MEDIA_WORD = re.compile("image|video|audio|embeds", re.IGNORECASE)
"""What makes a template write a medium's token, as Qwen2.5-Omni's does for `'image' in part`."""
_CONTENT = frozenset({"file", "refusal", "text", "thinking"})


def content_fields(part: Iterable[str]) -> list[str]:
    """Return the names of those fields of a part that are, or look like, its content.

    Of several, vLLM 0.32 takes one and either drops the others or shows them to the chat template.
    """
    return sorted(
        name for name in part if name != "type" and (name in _CONTENT or _MEDIA_WORD.search(name))
    )
