"""Turns an allocator's error into what the user can do about it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.planning.footprint_advice import advice
from vishwamai_mp.runtime.device import device, is_accelerator

# Of torch's CPU allocator, CUDA, NCCL, oneDNN and the C++ library; the name of an error that crossed processes as text.
_MESSAGE = re.compile(r"can't allocate memory|out of memory|not enough memory|bad_alloc|MemoryError", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None


@contextmanager
def advice_when_out_of_memory(config: PretrainConfig) -> Iterator[None]:
    """Runs training; where memory runs out, the error says what to change.

    Args:
        config: resolved.

    Raises:
        UserError: the allocator's words, what the run needs, and which settings lower it by how much.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        where = f" on rank {os.environ['RANK']}" if world_size > 1 else ""
        first, *changes = advice(config, world_size, is_accelerator(device())).split("\n")
        raise UserError(f"out of memory{where} ({_words(error)}); {first}", *changes) from error


def _words(error: BaseException) -> str:
    """The line of an allocator's error that says it."""
    lines = [line for line in str(error).splitlines() if _MESSAGE.search(line)] or [type(error).__name__]
    return re.sub(r"^\[enforce fail.*?\] .*?\. ", "", lines[0].strip())[:200]
