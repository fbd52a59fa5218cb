"""What the device can tell of its work: which activities a trace sees, and the history of its memory."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from vishwamai_mp.runtime.device import device

_ALLOCATIONS = 200_000  # the latest that are remembered: some hundred MiB of snapshot at most


def profiler_activities() -> list[ProfilerActivity]:
    """Operators on the CPU, and kernels on a GPU."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device().type == "cuda" else [])]


def has_memory_history() -> bool:
    """Whether the device's allocator can write down what it does. A CPU has none."""
    return device().type == "cuda"


def record_memory_history() -> None:
    """Let the GPU's allocator write down every allocation from now on."""
    torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)


def write_memory_history(path: Path) -> None:
    """End the recording, and write it in the format that https://pytorch.org/memory_viz shows."""
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
