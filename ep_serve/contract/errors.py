"""The error that engine and gateway raise for an invalid request."""

from __future__ import annotations


class FieldError(ValueError):
    """A request field that is invalid or out of bounds.

    Attributes:
        field: path of the field in the request body, such as `response_format.json_schema.schema`.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}.")
        self.field = field
