"""What this room raises on its own account."""

from __future__ import annotations


class ServeError(ValueError):
    """A server cannot run as asked; the message is one sentence for its operator."""
