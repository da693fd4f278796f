"""Replacing functions of vLLM's server, and checking that the replacements are in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ep_serve.engine.errors import ServeError

if TYPE_CHECKING:
    from collections.abc import Iterable

Patch = tuple[Any, str, Any]
"""A class or module of vLLM, the name of its attribute, and what takes that attribute's place."""

_applied: list[Patch] = []
_failures: list[Exception] = []


def apply(patches: Iterable[Patch]) -> None:
    """Replace attributes; doing it again changes nothing."""
    _applied[:] = patches
    for owner, name, replacement in _applied:
        setattr(owner, name, replacement)


def fail(error: Exception) -> None:
    """Record why patches could not be applied, for the error of `check`."""
    _failures.append(error)


def check() -> None:
    """Refuse to serve when a patch is not in place.

    Raises:
        ServeError: names what is missing.
    """
    missing = [
        f"{owner.__name__}.{name}"
        for owner, name, replacement in _applied
        if getattr(owner, name, None) is not replacement
    ]
    if _applied and not missing:
        return
    reason = ", ".join(missing) or next(iter(_failures), "none was installed")
    raise ServeError(
        "this model cannot be served, because changes to vLLM's API server that it needs are not "
        f"in place ({reason}): use vLLM 0.32, and no other plug-in that changes the same functions"
    )
