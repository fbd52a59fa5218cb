"""Turns an allocator's error into what the user can do about it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.planning.footprint_advice import advice, rank_memory, size_text
from vishwamai_mp.runtime.device import device, is_accelerator, machine_memory

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


def check_memory(config: PretrainConfig, world_size: int) -> str:
    """Compare what training needs with what the machine has, before a model is made on a CPU.

    A GPU's allocator fails when memory runs out; on a CPU the machine stalls, and then the kernel kills the process,
    which can say nothing any more.

    Args:
        config: resolved.
        world_size: processes.

    Returns:
        A warning where all fits but the activations, whose size is an estimate; otherwise empty.

    Raises:
        UserError: weights, gradients and optimizer state alone do not fit.
    """
    if is_accelerator(device()):
        return ""
    room, need = machine_memory(), rank_memory(config, world_size, on_gpu=False)
    if need.total <= room:
        return ""
    first, *changes = advice(config, world_size, on_gpu=False).split("\n")
    text = f"too large for this machine, which has {size_text(room)} of memory and swap per process: {first}"
    if any(" processes " in change for change in changes):
        changes.append(
            "  Processes of one machine share its memory: more of them need more machines, or a smaller model."
        )
    if need.states > room:
        raise UserError(text, *changes)
    return "\n".join([text, *changes])


def _words(error: BaseException) -> str:
    """The line of an allocator's error that says it."""
    lines = [line for line in str(error).splitlines() if _MESSAGE.search(line)] or [type(error).__name__]
    return re.sub(r"^\[enforce fail.*?\] .*?\. ", "", lines[0].strip())[:200]
