"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest

from tests.workers import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Processes for tests of distributed code; none starts before the first `workers.run(fn, world_size, …)`."""
    pool = WorkerPool()
    yield pool
    pool.close()
