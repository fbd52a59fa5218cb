"""A simulated accelerator: one rank of any job, with a GPU's rules, where there is neither the GPU nor the other ranks.

The program that trains runs as it is. What it computes with are tensors of a device named "simulated", which have
shapes, types and a device but no values (torch's FakeTensorMode), and process groups whose other members are not there
(torch's "fake" backend). As on a GPU, tensors of different devices do not mix, and a value that the host reads makes
it wait. What the rank needs and does is counted on the way: memory, operations, kernels, collectives, waits.

The device is registered under torch's key for devices of third parties, PrivateUse1, for the rest of the process: use a
process of its own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vishwamai_mp.runtime.simulated.job import SimulatedJob, simulated_job
    from vishwamai_mp.runtime.simulated.memory import Memory
    from vishwamai_mp.runtime.simulated.recorder import Communication, Recorder

__all__ = ["Communication", "Memory", "Recorder", "SimulatedJob", "simulated_job"]
_HOMES = {"Communication": "recorder", "Memory": "memory", "Recorder": "recorder"}


def __getattr__(name: str) -> Any:
    """Import what needs megatron-core when it is asked for: Transformer Engine's double comes first."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'job')}"), name)
