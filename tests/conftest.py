"""Which tests come first, which share a worker, and which run alone.

pytest-xdist gives each worker whole files, so that no fixture of a file is made twice. Files that
share a server are one group: their tests have the marker `xdist_group`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadGroupScheduling

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
HERE = Path(__file__)

if WORKER:
    # vLLM binds the threads of every engine to the same cores, and torch starts one a core. Two
    # workers would wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process starts with what fails soonest; workers, to end together, with what is long."""

    def place(item: pytest.Item) -> tuple[bool, ...]:
        marks = {mark.name for mark in item.iter_markers()}
        engine = "engine" in marks
        return ("quiet" in marks, not engine, "slow" not in marks) if WORKER else (engine,)

    items.sort(key=place)


class FilesAndGroups(LoadGroupScheduling):  # type: ignore[misc]  # xdist has no types
    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return scope.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesAndGroups | None:
    return FilesAndGroups(config, log) if config.getoption("dist") == "loadgroup" else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """A test marked `quiet` waits for those of other workers, and they for it."""
    with ExitStack() as stack:
        if WORKER:
            alone = item.get_closest_marker("quiet") is not None
            # One at a time comes in: who waits to be alone would wait for ever, else.
            with _locked(HERE.parent, fcntl.LOCK_EX):
                stack.enter_context(_locked(HERE, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return (yield)


@contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, operation)
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing leaves it locked if a fork has the file, too
        os.close(file)
