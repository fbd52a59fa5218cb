"""Process groups: made once from the layout, then passed around. The one reader of megatron-core's parallel_state."""

import atexit
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from vishwamai_mp.config import NcclConfig, ParallelConfig, PretrainConfig, UserError, data_parallel_size
from vishwamai_mp.config.job_environment import check_own_gpu, job_size, set_hardware_queues
from vishwamai_mp.runtime.determinism import set_determinism
from vishwamai_mp.runtime.device import device, keep_freed_memory, set_threads
from vishwamai_mp.runtime.exchange_buffers import close_exchange_buffers
from vishwamai_mp.runtime.fusion import set_fusion
from vishwamai_mp.runtime.gloo import groups_on_one_device

# Far from each other and from the tracker's own offsets (2718 + rank), so that neighbours' streams are apart.
_STEP, _PLACE = 1_000_003, 1_618_033_987


@dataclass(frozen=True)
class Runtime:
    """Where this process stands in the job.

    `groups` holds megatron-core's process groups (`tp`, `pp`, `cp`, `dp`, `dp_cp`, …).
    """

    rank: int
    world_size: int
    device: torch.device
    groups: ProcessGroupCollection

    @property
    def tensor_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def context_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def data_parallel_size(self) -> int:
        return self.groups.dp.size()

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.groups.pp.size() - 1

    @property
    def reports(self) -> bool:
        """Whether this process writes logs and metrics."""
        return self.rank == 0

    def describe(self) -> str:
        return (
            f"rank {self.rank} (tensor {self.tensor_rank}, pipeline {self.pipeline_rank},"
            f" context {self.context_rank}, data {self.data_rank})"
        )


def world_size() -> int:
    """Processes in the job, known from torchrun before anything is initialised."""
    return dist.get_world_size() if dist.is_initialized() else job_size() or 1


def initialize(config: PretrainConfig) -> Runtime:
    """Join the job and make its process groups.

    Uses torchrun's environment; without it, this process alone is the world. A default process group that exists
    already is used as it is.

    Raises:
        ConfigError: the world does not fit the layout, or the environment contradicts `training.deterministic`.
    """
    data_parallel_size(config, world_size())
    set_threads(config.training.threads)
    keep_freed_memory()
    set_determinism(config.training.deterministic)
    set_fusion(config.training.compile)
    if config.training.cuda_graphs:
        # NCCL would register the buffers of captured exchanges, which the allocator's expandable segments
        # (launch/environment.sh) do not allow: megatron-core warns of illegal accesses to memory.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    parallel = config.parallel
    with groups_on_one_device(), _nccl_file(parallel) as nccl_file:
        _join(parallel)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            distributed_timeout_minutes=parallel.timeout_minutes,
            nccl_communicator_config_path=nccl_file,
            create_gloo_process_groups=device().type == "cuda",
        )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    seed_step(config.training.seed, 0, groups)
    return Runtime(dist.get_rank(), dist.get_world_size(), device(), groups)


@contextmanager
def _nccl_file(parallel: ParallelConfig) -> Iterator[str | None]:
    """`parallel.nccl` as the file that megatron-core reads it from; None: NCCL has no options, or no part."""
    if parallel.nccl is None or device().type != "cuda":
        yield None
        return
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # JSON is YAML
        json.dump(_options(parallel.nccl), file)
        file.flush()
        yield file.name


def _options(nccl: NcclConfig) -> dict[str, dict[str, Any]]:
    """By process group, what is not left to NCCL."""
    return {
        name: {key: value for key, value in options.items() if value is not None}
        for name, options in asdict(nccl).items()
        if options is not None
    }


@contextmanager
def collectives_within(minutes: float | None, parallel: ParallelConfig) -> Iterator[None]:
    """Meanwhile a collective of this process may wait so long; then again `parallel.timeout_minutes`.

    Args:
        minutes: None: as always.
        parallel: of the job.
    """
    if minutes is None:
        yield
        return
    _set_timeout(minutes)
    try:
        yield
    finally:
        _set_timeout(parallel.timeout_minutes)


def _set_timeout(minutes: float) -> None:
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=minutes), group)


def _join(parallel: ParallelConfig) -> None:
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
    if device().type == "cuda":
        set_hardware_queues(parallel)
        check_own_gpu(torch.cuda.device_count())
        torch.cuda.set_device(device())
    backend = "nccl" if device().type == "cuda" else "gloo"
    if job_size():
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            port = os.environ["MASTER_PORT"]
            raise UserError(f"MASTER_PORT={port}: another program of this machine has it; name a free one") from None
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def shutdown(keep_world: bool = False) -> None:
    """Release the process groups (`keep_world`: all but the default one), and what was made for them."""
    close_exchange_buffers()
    parallel_state.destroy_model_parallel()
    if not keep_world and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def distributed_session(config: PretrainConfig) -> Iterator[Runtime]:
    """`initialize`, and on success `shutdown`. After an error the groups are left: peers may never answer."""
    runtime = initialize(config)
    yield runtime
    shutdown()


_kept: tuple[ParallelConfig, Runtime] | None = None  # what `standing_session` opened


def standing_session(config: PretrainConfig) -> Runtime:
    """`initialize`, for a program or notebook that trains several times: the groups stay until the process ends.

    Another layout makes new groups; a model of the earlier ones can no longer run then.
    """
    global _kept
    if _kept is None:
        atexit.register(_leave)
    elif parallel_state.model_parallel_is_initialized() and _is_current(_kept[1]):
        parallel, runtime = _kept
        if parallel == config.parallel:
            set_threads(config.training.threads)
            set_determinism(config.training.deterministic)
            set_fusion(config.training.compile)
            return runtime
        shutdown(keep_world=True)
    runtime = initialize(config)
    _kept = config.parallel, runtime
    return runtime


def _is_current(runtime: Runtime) -> bool:
    """Whether these are the groups that megatron-core has now: somebody else may have made others since."""
    return parallel_state.get_tensor_model_parallel_group() is runtime.groups.tp


def _leave() -> None:
    if not hasattr(sys, "last_value"):  # after an error peers may never answer
        shutdown()


def seed_step(seed: int, step: int, groups: ProcessGroupCollection) -> None:
    """Seed every generator of this process for one training step: a resumed run needs no saved generator states.

    megatron-core's tracker then gives replicated regions equal streams on all tensor parallel ranks, and sharded
    regions streams of their own. Data and context parallel ranks and pipeline stages, which see other tokens or are
    other layers, draw other numbers.

    Args:
        seed: of the run.
        step: from 0.
        groups: where this rank stands.
    """
    place = groups.dp_cp.rank() * groups.pp.size() + groups.pp.rank()
    # The tracker stays the object that it was: Transformer Engine's attention keeps the one that it was built with.
    tensor_parallel.model_parallel_cuda_manual_seed((seed + step * _STEP + place * _PLACE) % 2**31)
