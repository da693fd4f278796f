from __future__ import annotations

from pathlib import Path

import pytest

from ep_serve.checkpoint.embedded import build


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint with random weights."""
    return build(tmp_path_factory.mktemp("embedded") / "model")
