"""Where it runs: device, process groups, seeds, and the adapter that lets megatron-core run without CUDA.

Importing this package installs the adapter; import it before `megatron.core`.
"""

import logging
import warnings
from typing import TYPE_CHECKING, Any

from vishwamai_mp.runtime.importing import kept

with kept():
    from vishwamai_mp.runtime import megatron_cpu

megatron_cpu.install()
# What megatron-core says at every start and nobody who uses this package can act on.
for _message in (
    ".*(Transformer Engine|Apex|apex).*",  # absent: we know, and choose accordingly
    "full scope is deprecated",  # its own default
    ".*CUDA_DEVICE_MAX_CONNECTIONS",  # we set it by layout, and say so
    "You are using quantized weights without quantized compute",  # in generation, which is meant to
    "The .grad attribute of a Tensor that is not a leaf",  # it looks before it knows
    ".*torch.distributed.*_tensor` is deprecated",
    "`load_state_dict` is deprecated",  # in its checkpoint reader
    "The argument order of load has been changed",  # likewise, from 0.19 on
    "torch.distributed is disabled, unavailable",  # where one process reads
    "MimoModelConfig is experimental",  # which it imports unasked
    "FSDP2-wrapped module .* returned a view",  # of losses, which nobody changes in place
):
    warnings.filterwarnings("ignore", message=_message)
# torch's, of its CUDA build on a machine with CUDA's compiler and no GPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.getMessage())

from vishwamai_mp.runtime.device import (  # noqa: E402
    device,
    is_accelerator,
    local_rank,
    multiplies_natively,
    room_on_host,
    wait_for_device,
)
from vishwamai_mp.runtime.failure import run_distributed_program  # noqa: E402
from vishwamai_mp.runtime.fused_layers import has_transformer_engine  # noqa: E402

if TYPE_CHECKING:
    from vishwamai_mp.runtime.distributed import (
        Runtime,
        distributed_session,
        initialize,
        seed_step,
        shutdown,
        standing_session,
    )

__all__ = [
    "Runtime",
    "device",
    "distributed_session",
    "has_transformer_engine",
    "initialize",
    "is_accelerator",
    "local_rank",
    "multiplies_natively",
    "room_on_host",
    "run_distributed_program",
    "seed_step",
    "shutdown",
    "standing_session",
    "wait_for_device",
]


def __getattr__(name: str) -> Any:
    """Import what needs megatron-core, which takes seconds, when it is first asked for."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.distributed"), name)
