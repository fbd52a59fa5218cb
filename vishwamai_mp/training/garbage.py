"""Python's garbage collector, run on all ranks after the same steps rather than on each when its count is full.

It stops the program for a tenth of a second or more, and in a job every rank waits for the one that it stops. What
reference counts do not free, cycles, grows until it runs.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def garbage_collected_every(steps: int | None) -> Iterator[Callable[[int], None]]:
    """Leave the collector off meanwhile.

    Args:
        steps: between two collections; None: Python decides, as usual.

    Yields:
        What to call with the number of finished steps after each step.
    """
    if steps is None:
        yield lambda _: None
        return

    def collect(finished: int) -> None:
        if finished % steps == 0:
            gc.collect()

    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield collect
    finally:
        if was_on:
            gc.enable()
