"""The error of the checkpoint package."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used like this; the message is one sentence for its owner."""
