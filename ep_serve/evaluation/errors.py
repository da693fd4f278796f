"""The error of this package."""

from __future__ import annotations


class EvaluationError(ValueError):
    """An evaluation is not possible; the message is one sentence for the user."""
