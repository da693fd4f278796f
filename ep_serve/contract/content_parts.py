"""Find the content fields of chat message parts; a valid part has exactly one."""

from __future__ import annotations

import re
from collections.abc import Iterable

_MEDIA_WORD = re.compile("image|video|audio|embeds", re.IGNORECASE)
"""Keys that make chat templates write media tokens, as `'image' in part` does in Qwen2.5-Omni's."""
_CONTENT = frozenset({"file", "refusal", "text", "thinking"})


def content_fields(part: Iterable[str]) -> list[str]:
    """Return the names of the fields of a part that are, or look like, its content.

    If there are several, vLLM 0.32 uses one and drops the others or passes them to the template.
    """
    return sorted(
        name for name in part if name != "type" and (name in _CONTENT or _MEDIA_WORD.search(name))
    )
