"""What engine and gateway raise for a request they do not serve."""

from __future__ import annotations


class FieldError(ValueError):
    """A field of a request that is out of bounds.

    Attributes:
        field: path of the field in the request body, such as `response_format.json_schema.schema`.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}.")
        self.field = field
