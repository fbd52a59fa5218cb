"""Importing what stays: torch, megatron-core and what is built on them are 300,000 objects to Python's collector."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep the collector away from what is imported meanwhile, then and later.

    It would look through it again and again while it is made, at each full collection, and several times when the
    program ends: a third of the time of a program that imports the model and ends.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
