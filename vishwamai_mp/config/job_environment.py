"""What a launcher (torchrun, or one's own) says of a job in the environment, read in one place and as a whole.

A half of it is worse than none: processes that each take themselves for the whole job write into one run folder, or
wait for peers that never come. And what the layout asks of the environment, where nobody has said otherwise.
"""

import os

from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.config.schema import ParallelConfig

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_START = "start the job with torchrun, or unset"
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def job_size() -> int | None:
    """The processes of the job that this one belongs to; None: no launcher has started it.

    Raises:
        ConfigError: the environment is a part of a launcher's, or contradicts itself.
    """
    found = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not found:
        return None
    if missing := [name for name in _NEEDED if not os.environ.get(name, "").strip()]:
        raise ConfigError(
            f"{' and '.join(found)} {'are' if len(found) > 1 else 'is'} in the environment, as a launcher's, but not"
            f" {' and '.join(missing)}: {_START} {' and '.join(found)}"
        )
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    _below("RANK", rank, "WORLD_SIZE", size)
    port = _number("MASTER_PORT", 0)
    if port >= 1 << 16:
        raise ConfigError(f"MASTER_PORT={port} in the environment: not a port, which are below 65536")
    if "LOCAL_WORLD_SIZE" in os.environ:
        _below("LOCAL_RANK", _number("LOCAL_RANK", 0), "LOCAL_WORLD_SIZE", _number("LOCAL_WORLD_SIZE", 1))
    elif "LOCAL_RANK" in os.environ:
        _number("LOCAL_RANK", 0)
    return size


def check_own_gpu(gpus: int) -> None:
    """Refuse to share a GPU with another process of the job by oversight, or to take one that is not there.

    Args:
        gpus: of this machine, as far as this process sees them.

    Raises:
        ConfigError: LOCAL_RANK is missing, or beyond the GPUs.
    """
    if "LOCAL_RANK" in os.environ:
        local = _number("LOCAL_RANK", 0)
        if local >= gpus:
            raise ConfigError(
                f"LOCAL_RANK={local} in the environment: this process sees {gpus} GPU{'s' if gpus > 1 else ''}; start"
                " as many processes on a machine as it has GPUs, and check CUDA_VISIBLE_DEVICES"
            )
    elif gpus > 1 and (job_size() or 1) > 1:
        raise ConfigError(
            f"LOCAL_RANK is not in the environment: each process of this machine would take the first of its {gpus}"
            " GPUs; start the job with torchrun, or set it (under srun: LOCAL_RANK=$SLURM_LOCALID)"
        )


def set_hardware_queues(parallel: ParallelConfig) -> None:
    """Have a GPU take kernels in as few queues, or as many, as the layout's exchanges need; before CUDA starts.

    In one queue kernels start in the order of their launch, so that an exchange between tensor or context parallel
    ranks is on its way before the product that it overlaps fills the GPU. Fully sharded weights are gathered ahead of
    their use, and in one queue the layers before would hold them up: eight, which is CUDA's default (NVIDIA, CUDA C++
    Programming Guide, "CUDA Environment Variables"). What the environment says already stays.
    """
    if need := _needed_queues(parallel):
        os.environ.setdefault(_QUEUES, need[0])


def hardware_queues(parallel: ParallelConfig) -> str | None:
    """What the environment says of them, and whether it should, for the user of a GPU; None: the layout needs none."""
    need = _needed_queues(parallel)
    if need is None:
        return None
    wanted, why = need
    found = os.environ.get(_QUEUES)
    line = f"{_QUEUES} is {found or 'not set, so 8'}: {why}"
    is_contrary = (found == "1") != (wanted == "1")
    return f"{line}; set {_QUEUES}={wanted} before the program starts" if is_contrary else line


def _needed_queues(parallel: ParallelConfig) -> tuple[str, str] | None:
    if parallel.fully_sharded:
        return "8", "fully sharded weights are gathered ahead of their use only in more than one"
    if parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1:
        return "1", "tensor and context parallel exchanges overlap products only in one"
    return None


def _number(name: str, least: int) -> int:
    text = os.environ.get(name, "").strip()
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ConfigError(f"{name}={text} in the environment: not a whole number from {least} on; {_START} {name}")
    return int(text)


def _below(name: str, value: int, most_name: str, most: int) -> None:
    if value >= most:
        raise ConfigError(f"{name}={value} in the environment: not below {most_name}={most}; {_START} both")
