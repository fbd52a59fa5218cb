"""Triton kernels: where they run, and one way to launch them.

On the simulated accelerator a launch is noted, with its floating-point operations, and nothing runs; Triton is not
needed there.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.runtime.device import is_accelerator
from vishwamai_mp.runtime.simulated.kernel import launch

_SUMMED_COLUMNS = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_take(*tensors: Tensor) -> bool:
    """Whether kernels may compute on these: in fp32, bf16 or fp16, on a GPU where Triton is installed.

    The environment variable VISHWAMAI_TRITON=0 leaves all kernels out.
    """
    return (
        is_accelerator(tensors[0])
        and all(x.dtype in _DTYPES for x in tensors)
        and os.environ.get("VISHWAMAI_TRITON") != "0"
        and (tensors[0].device.type != "cuda" or _has_triton())
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def run_kernel(
    module: str,
    name: str,
    grid: tuple[int, ...],
    inputs: Sequence[Any],
    outputs: Sequence[Tensor],
    sizes: Sequence[float],
    constants: dict[str, Any],
    flops: int = 0,
    warps: int = 8,
) -> None:
    """Launch a kernel.

    Args:
        module: of this package, that has it.
        name: the kernel's.
        grid: programs.
        inputs: its first arguments: tensors and strides.
        outputs: the next.
        sizes: the last that are not constants.
        constants: what it is compiled for.
        flops: of its matrix products; a multiply-add counts as two.
        warps: of a program.
    """
    tensors = [x for x in (*inputs, *outputs) if isinstance(x, Tensor)]
    if tensors[0].device.type == "simulated":
        launch(f"{module.rpartition('.')[2].removesuffix('_kernels')}_{name}", *tensors, flops=flops)
        return
    kernel = getattr(import_module(f"vishwamai_mp.{module}"), name)
    kernel[grid](*inputs, *outputs, *sizes, **constants, num_warps=warps, num_stages=1)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, …) fp32, contiguous → their sum over R, (…), rounded to `dtype` once. By a kernel: one launch."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    width = out.numel()
    run_kernel(
        "runtime.sum_kernels",
        "columns",
        (-(-width // _SUMMED_COLUMNS),),
        [parts],
        [out],
        [len(parts), width],
        {"RB": 16, "BLOCK": _SUMMED_COLUMNS},
        warps=4,
    )
    return out


def power_of_two(size: int, least: int = 16) -> int:
    """The next one that is at least `least`: 16 is the least side of a matrix that tensor cores take."""
    return max(least, 1 << (size - 1).bit_length())
