from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loadtest.mock_server import MockServer, serving


@pytest.fixture
def mock() -> Iterator[MockServer]:
    with serving(MockServer()) as server:
        yield server
