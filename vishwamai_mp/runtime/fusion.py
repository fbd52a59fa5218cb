"""What lies between matrix products as one loop each: `training.compile`.

Each operator of torch reads and writes memory once, so an RMSNorm is half a dozen passes over its rows. With
`training.compile` torch.compile makes of each `fusible` function one loop in C++, which torch keeps in its cache
between starts. Results are the operators' within rounding.
"""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.runtime.device import device, is_accelerator

Function = TypeVar("Function", bound=Callable[..., Any])

_MOST_KINDS = 64
_VECTOR_BITS = {"AVX2": 256, "AVX512": 512}  # by torch's name of the CPU's instructions

_enabled = False


def set_fusion(enabled: bool) -> None:
    """Whether this process compiles from now on.

    Raises:
        ConfigError: the device is not a CPU, or torch finds no C++ compiler that works.
    """
    global _enabled
    if enabled and not _enabled:
        if is_accelerator(device()):
            raise ConfigError("training.compile fuses on CPUs alone; on an accelerator leave it out")
        _try_compiler()
    _enabled = enabled


def fuses() -> bool:
    """Whether `fusible` functions are compiled now. Where tensors have no values, nothing is computed nor compiled."""
    return _enabled and not is_in_torch_dispatch_mode()


def fusible(function: Function) -> Function:
    """A function of tensors and numbers without side effects, which is one loop where `fuses` says so."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        # One loop for all shapes: were the first shape to get its own, a resumed run, whose first shape may be another,
        # would not compute the same bits.
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return (compiled() if fuses() else function)(*args, **options)

    return cast(Function, call)


def _try_compiler() -> None:
    import torch._dynamo.config
    import torch._dynamo.exc
    import torch._inductor.config

    # Beyond it a function is not compiled for a further kind of tensors (a dtype, a number of dimensions, an order in
    # memory), and which come last may differ from run to run.
    torch._dynamo.config.recompile_limit = _MOST_KINDS
    # Torch's cache takes this into account, but not what the CPU can: code made for vectors of one width and compiled
    # for another computes nonsense.
    torch._inductor.config.cpp.simdlen = _VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
    wanted = os.environ.get("CXX", "g++")
    try:
        if shutil.which(wanted) is None:
            raise FileNotFoundError(f"{wanted} is not found")
        torch.compile(_trial)(torch.ones(64))
    except (FileNotFoundError, torch._dynamo.exc.TorchDynamoException) as error:
        cause = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"training.compile: no C++ compiler that works here ({cause}); install one with OpenMP"
            " (on Debian: g++), name it by CXX, or leave training.compile out"
        ) from error


def _trial(x: Tensor) -> Tensor:
    return x.exp() * x
