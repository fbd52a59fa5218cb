"""Fixtures for all tests."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.workers import WorkerPool

# The same ways of computing on every machine and however busy it is; tests/runtime/test_choices.py holds the others
# against these.
os.environ["VISHWAMAI_WAYS"] = "first"

# A minute or more each: first, so that two processes end at about the same time.
_LONGEST = (
    "tests/examples/test_chaos.py",
    "tests/test_readme.py",
    "tests/examples/test_reasoning.py",
    "tests/examples/test_hangs.py",
    "tests/examples/test_kill_and_resume.py",
    "tests/training/test_layouts.py",
    "tests/training/test_resume.py",
    "tests/launch/test_processes.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """What the test modules import stays: no garbage to look for while it is made, nor at each later collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Processes for tests of distributed code; none starts before the first `workers.run(fn, world_size, …)`."""
    pool = WorkerPool()
    yield pool
    pool.close()
