from __future__ import annotations

import pytest

from ep_serve.engine.server.serve import _defaults


@pytest.mark.parametrize(
    ("forwarded", "cache"),
    [
        ([], ["--mm-processor-cache-gb", "1"]),
        (["--mm-processor-cache-gb", "3"], []),
        (["--mm_processor_cache_gb=3"], []),
    ],
)
def test_what_is_asked_for_stands_above_our_defaults(
    forwarded: list[str], cache: list[str]
) -> None:
    defaults = _defaults(forwarded)
    at = defaults.index("--mm-processor-cache-gb") if cache else len(defaults)
    assert defaults[at : at + 2] == cache
