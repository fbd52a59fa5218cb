"""Fixtures for all tests."""

import os
from collections.abc import Iterator

import pytest

from tests.workers import WorkerPool

# The same ways of computing on every machine and however busy it is; tests/runtime/test_choices.py holds the others
# against these.
os.environ["VISHWAMAI_WAYS"] = "first"

# Minutes each: first, so that two processes end at about the same time.
_LONGEST = (
    "tests/examples/test_chaos.py",
    "tests/test_readme.py",
    "tests/examples/test_reasoning.py",
    "tests/examples/test_hangs.py",
    "tests/examples/test_kill_and_resume.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Processes for tests of distributed code; none starts before the first `workers.run(fn, world_size, …)`."""
    pool = WorkerPool()
    yield pool
    pool.close()
