"""Installs this project's changes to vLLM's API server, and checks that they are in place.

vLLM builds its configuration in every process that takes requests, however that was started, and
calls `config_hook.py` there, which installs them. A script that uses `LLM` needs none of them, so
one that cannot be installed fails a server only: `check` is called when vLLM builds `AsyncLLM`, and
again when it builds the HTTP application.
"""

from __future__ import annotations

from typing import Any

from ep_serve.engine.errors import ServeError

Patch = tuple[Any, str, Any]
"""A class or module of vLLM, the name of its attribute, and what takes that attribute's place."""

_patches: list[Patch] = []
_failure: Exception | None = None


def install() -> None:
    """Patch vLLM in this process; calling it again changes nothing."""
    global _failure
    try:
        from ep_serve.engine import (
            drain,
            health,
            openai_patch,
            request_limits,
            sent_items,
            tokenization,
        )
    except (ImportError, AttributeError) as error:  # vLLM moved what they replace
        _failure = error
        return
    modules = (openai_patch, request_limits, tokenization, sent_items, drain, health)
    _patches[:] = [patch for module in modules for patch in module.PATCHES]
    for owner, name, replacement in _patches:
        setattr(owner, name, replacement)


def check() -> None:
    """Refuse to serve when a patch is not in place.

    Raises:
        ServeError: names what is missing.
    """
    missing = [
        f"{owner.__name__}.{name}"
        for owner, name, replacement in _patches
        if getattr(owner, name, None) is not replacement
    ]
    if _patches and not missing:
        return
    reason = ", ".join(missing) or _failure or "none was installed"
    raise ServeError(
        "this model cannot be served, because changes to vLLM's API server that it needs are not "
        f"in place ({reason}): use vLLM 0.32, and no other plug-in that changes the same functions"
    )
