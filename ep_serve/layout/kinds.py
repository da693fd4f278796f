"""The kind of token at a prompt position."""

from __future__ import annotations

import enum


class Kind(enum.IntEnum):
    """Content of one prompt position; all but `TEXT` are AV tokens, which come from a tower."""

    TEXT = 0
    VIDEO = 1
    AUDIO = 2
    IMAGE = 3
