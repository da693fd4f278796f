"""Installs this project's changes to vLLM's API server.

vLLM builds its configuration in every process that takes requests, however that was started, and
calls `config_hook.py` there, which installs them. A script that uses `LLM` needs none of them, so
one that cannot be installed fails a server only: `patching.check` is called when vLLM builds
`AsyncLLM`, and again when it builds the HTTP application.
"""

from __future__ import annotations

from ep_serve.engine.server import patching


def install() -> None:
    """Patch vLLM in this process; calling it again changes nothing."""
    try:
        from ep_serve.engine.server import (
            drain,
            health,
            openai_patch,
            request_limits,
            sent_items,
            tokenization,
        )
    except (ImportError, AttributeError) as error:  # vLLM moved what they replace
        patching.fail(error)
        return
    modules = (openai_patch, request_limits, tokenization, sent_items, drain, health)
    patching.apply([patch for module in modules for patch in module.PATCHES])
