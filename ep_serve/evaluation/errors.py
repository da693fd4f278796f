"""The one error this room raises."""

from __future__ import annotations


class EvaluationError(ValueError):
    """Something cannot be evaluated as asked; the message is one sentence for its owner."""
