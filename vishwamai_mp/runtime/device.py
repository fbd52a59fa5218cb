"""Which device this process computes on, and what that device is good at."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from vishwamai_mp.config.wording import counted
from vishwamai_mp.runtime.products import cpu_multiplies, linear_fp32

# Dense peaks of 16 bits in TFLOP/s, from data sheets, by words of CUDA's names; the longest that match win.
GPU_PEAK_TFLOPS = {
    "V100": 125.0,
    "A100": 312.0,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H200": 989.4,
    "B200": 2250.0,
    "B300": 2250.0,
    "GB200": 2450.0,
    "GB300": 2450.0,
    "L4": 121.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "MI300X": 1307.4,
}
_MOST_PER_CORE = 4
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def machine_memory() -> float:
    """This process's share of the machine's memory and swap, in bytes."""
    whole = psutil.virtual_memory().total + psutil.swap_memory().total
    return whole / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its machine (torchrun's LOCAL_RANK; 0 without torchrun)."""
    return int(os.environ.get("LOCAL_RANK", 0))


_in_place_of: torch.device | None = None  # what `compute_on` set: the simulated accelerator


def device() -> torch.device:
    """The GPU of this local rank, or the CPU; within `runtime.simulated`, the simulated accelerator."""
    return _in_place_of or _machine()


@cache
def _machine() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def compute_on(other: torch.device) -> Iterator[None]:
    """Meanwhile `device()` is another one than the machine's."""
    global _in_place_of
    before, _in_place_of = _in_place_of, other
    try:
        yield
    finally:
        _in_place_of = before


def is_accelerator(where: Tensor | torch.device) -> bool:
    """Whether a tensor lies on, or a device is, a GPU or the simulated accelerator: what has memory and kernels of its
    own and works while the host goes on."""
    return (where if isinstance(where, torch.device) else where.device).type not in ("cpu", "meta")


def room_on_host() -> float:
    """Bytes that each process of this machine can have of its free memory; no limit in simulation, which takes none."""
    if device().type == "simulated":
        return float("inf")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):  # what Linux would give besides, of files that it has read
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def wait_for_device() -> None:
    """Until all that was asked of an accelerator is done, copies to the host among it."""
    if is_accelerator(device()):
        torch.get_device_module(device().type).synchronize()


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of `dtype` in hardware."""
    return is_accelerator(device()) or cpu_multiplies(dtype)


def cpu_threads(configured: int | None) -> tuple[int, str]:
    """Threads that this process computes with on a CPU, and what decides it.

    `training.threads`, else OMP_NUM_THREADS, else an equal share of the cores that the affinity mask allows.
    torchrun, and the scripts in launch/, set OMP_NUM_THREADS=1 where it is not set; under torchrun a 1 says nothing.

    Args:
        configured: training.threads.
    """
    if configured:
        return configured, "training.threads"
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if said.isdecimal() and int(said) > (1 if "TORCHELASTIC_RUN_ID" in os.environ else 0):
        if int(said) > _MOST_PER_CORE * allowed:  # thousands of threads spin, and no step ends
            return _MOST_PER_CORE * allowed, f"OMP_NUM_THREADS={said}, cut down to {_MOST_PER_CORE} a core"
        return int(said), "OMP_NUM_THREADS"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shared = f"{counted(allowed, 'core')} / {counted(processes, 'process')}"
    return max(1, allowed // processes), f"{shared}; training.threads changes it"


def set_threads(configured: int | None) -> None:
    """Use `cpu_threads`. No effect on GPUs."""
    if device().type == "cpu":
        torch.set_num_threads(cpu_threads(configured)[0])


def keep_freed_memory() -> None:
    """Let glibc hand out anew what was freed, rather than return large pieces to the kernel each time. CPUs only.

    A step asks for the same sizes as the step before, and the kernel clears each page that it gives: on a virtual
    machine a seventh of the processor time of a step in bf16, whose peak of memory stayed what it was. Left alone where
    the environment says how to allocate, or the C library is another.
    """
    said = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if device().type == "cpu" and not said and sys.platform == "linux" and hasattr(libc := CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_flops(dtype: torch.dtype, configured_tflops: float | None = None) -> float:
    """FLOP/s that one process could reach at best.

    Args:
        dtype: of the matrices.
        configured_tflops: the user's figure, which wins.

    Returns:
        a GPU's data-sheet value, or the best of a few large matrix products on the CPU with this process's threads.
    """
    if configured_tflops:
        return configured_tflops * 1e12
    if device().type == "cuda":
        name = torch.cuda.get_device_name()
        known = [key for key in GPU_PEAK_TFLOPS if all(word in name for word in key.split())]
        return GPU_PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else float("nan")
    return _measured_matmul_flops(dtype if multiplies_natively(dtype) else torch.float32, torch.get_num_threads())


@cache
def _measured_matmul_flops(dtype: torch.dtype, threads: int, size: int = 1024) -> float:
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        linear_fp32(left, right) if dtype == torch.float32 else left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_memory_gib() -> float:
    """The most memory this process has held: allocated on the GPU, resident on the CPU. GiB."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def at_once(where: Tensor, on_cpu: int) -> int:
    """How many numbers to compute at once where a computation is cut into pieces.

    Args:
        where: a tensor of the device.
        on_cpu: as many as stay in a CPU's caches until they are used; an accelerator takes a quarter of a gigabyte in
            fp32, for its memory's sake only: a kernel on fewer costs more to launch than to run.
    """
    return 2**26 if is_accelerator(where) else on_cpu


def row_blocks(rows_NW: Tensor) -> list[slice]:
    """Slices of the rows, each a megabyte in fp32 on CPUs, as large as `at_once` says on accelerators."""
    count = max(1, at_once(rows_NW, 2**18) // max(1, rows_NW.shape[-1]))
    return [slice(first, first + count) for first in range(0, len(rows_NW), count)]
