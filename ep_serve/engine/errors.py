"""Errors of the engine package."""

from __future__ import annotations


class ServeError(ValueError):
    """A server cannot run with these settings; the message is one sentence for its operator."""
