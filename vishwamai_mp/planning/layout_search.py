"""Which layout of a job is fastest of those that fit: all of them are estimated, none is run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from vishwamai_mp.config import ConfigError, ParallelConfig, PretrainConfig, UserError, resolve
from vishwamai_mp.config.check_gpu_attention import check_gpu_attention
from vishwamai_mp.config.schema import Precision
from vishwamai_mp.planning.footprint import Footprint, job_footprint
from vishwamai_mp.planning.hardware import Gpu
from vishwamai_mp.planning.step_time import Machine, StepTime, step_time, tokens_per_second_per_gpu

MOST_GPUS = 1 << 17  # up to which a job that does not fit is tried on more
_RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
_MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """One layout.

    Attributes:
        config: resolved for the job.
        footprint: bytes of the rank that needs most.
        time: of a step; None: it does not fit, so nobody needs to know.
    """

    config: PretrainConfig
    world_size: int
    footprint: Footprint
    time: StepTime | None

    @property
    def rate(self) -> float:
        """Tokens/s and GPU."""
        return tokens_per_second_per_gpu(self.config, self.world_size, self.time) if self.time else 0.0

    @property
    def label(self) -> str:
        parallel, training = self.config.parallel, self.config.training
        parts = [
            f"tensor {parallel.tensor_model_parallel_size}",
            f"pipeline {parallel.pipeline_model_parallel_size}",
            f"chunks {parallel.virtual_pipeline_model_parallel_size or 1}",
            f"context {parallel.context_parallel_size}",
            f"micro-batch {training.micro_batch_size}",
            f"recompute {training.recompute}",
        ]
        parts += ["fully sharded"] if parallel.fully_sharded else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Plan:
    """What came of a search.

    Attributes:
        room: bytes that a job may use of a GPU.
        fitting: fastest first.
        too_large: those that lack memory, least first.
        refused: how many layouts the configuration refused, by its reason.
    """

    machine: Machine
    world_size: int
    room: float
    fitting: list[Candidate]
    too_large: list[Candidate]
    refused: dict[str, int]


def usable_memory(gpu: Gpu) -> float:
    """Bytes that a job may plan with: a twentieth stays free, for what no formula knows."""
    return 0.95 * gpu.memory


def search(config: PretrainConfig, world_size: int, machine: Machine, precisions: tuple[Precision, ...] = ()) -> Plan:
    """Try every layout of a job.

    Args:
        config: a recipe. Its model, components, sequence length and global batch are kept.
        world_size: GPUs.
        precisions: to try besides the recipe's.

    Raises:
        UserError: the GPU does not compute in the recipe's precision.
        ConfigError: the recipe is wrong whatever the layout.
    """
    check_precision(config.precision, machine.gpu)
    room = usable_memory(machine.gpu)
    fitting: list[Candidate] = []
    too_large: list[Candidate] = []
    refused: dict[str, int] = {}
    for asked in _variants(config, world_size, machine.gpu, precisions):
        try:
            resolved = resolve(asked, world_size)
            check_gpu_attention(resolved)
        except ConfigError as error:
            refused[str(error)] = refused.get(str(error), 0) + 1
            continue
        need = job_footprint(resolved, world_size)
        fits = need.total <= room
        time = step_time(resolved, world_size, machine) if fits else None
        (fitting if fits else too_large).append(Candidate(resolved, world_size, need, time))
    fitting.sort(key=lambda one: (-one.rate, one.footprint.total))
    too_large.sort(key=lambda one: one.footprint.total)
    return Plan(machine, world_size, room, fitting, too_large, refused)


def check_precision(precision: str, gpu: Gpu) -> None:
    """
    Raises:
        UserError: the GPU's tensor cores do not know the type.
    """
    if precision == "bf16" and not gpu.has_bf16:
        raise UserError(f"precision=bf16: {gpu.title} has no bf16 matrix products; use precision=fp16")
    if precision.startswith("fp8") and "8" not in gpu.peak:
        raise UserError(f"precision={precision}: {gpu.title} has no FP8 matrix products; use precision=bf16")
    if precision == "nvfp4" and "4" not in gpu.peak:
        raise UserError(f"precision={precision}: {gpu.title} has no FP4 matrix products; use fp8_current or bf16")


def nearest_that_fits(config: PretrainConfig, machine: Machine, more_than: int) -> Candidate | None:
    """The fastest layout on the fewest GPUs, of the powers of two above `more_than`, that is possible and fits.

    Where the global batch has fewer sequences than there would be GPUs, it may grow with them.
    """
    world_size = 1 << more_than.bit_length()
    while world_size <= MOST_GPUS:
        batch = config.training.global_batch_size
        for sequences in dict.fromkeys((batch, max(batch, world_size))):
            larger = replace(config, training=replace(config.training, global_batch_size=sequences))
            found = search(larger, world_size, machine).fitting
            if found:
                return found[0]
        world_size *= 2
    return None


def _variants(
    config: PretrainConfig, world_size: int, gpu: Gpu, precisions: tuple[Precision, ...]
) -> Iterator[PretrainConfig]:
    model, training = config.model, config.training
    for tensor, stages, context in product(_powers(min(world_size, gpu.domain, 16)), _stages(config), _powers(16)):
        if world_size % (tensor * stages * context) or model.num_attention_heads % tensor:
            continue
        if context > 1 and training.sequence_length < 4096 * context:
            continue  # pieces too short to be worth the traffic
        replicas = world_size // (tensor * stages * context)
        for micro, recompute, chunks, sharded, precision in product(
            _MICRO_BATCHES,
            _RECOMPUTE,
            _chunks(config, stages),
            (False, True),
            (config.precision, *precisions),
        ):
            if training.global_batch_size % (micro * replicas) and micro > 1:
                continue
            if sharded and (tensor * stages * context > 1 or replicas == 1):
                continue
            if recompute == "selective" and model.attention_dropout == 0:
                continue  # flash attention keeps nothing that could be made again
            parallel = ParallelConfig(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=stages,
                virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
                context_parallel_size=context,
                sequence_parallel=tensor > 1,
                use_distributed_optimizer=True,
                fully_sharded=sharded,
                reduce_grads_in=config.parallel.reduce_grads_in,
                fuse_grad_accumulation=config.parallel.fuse_grad_accumulation,
                overlap_tensor_parallel=config.parallel.overlap_tensor_parallel and tensor > 1,
                timeout_minutes=config.parallel.timeout_minutes,
                step_timeout_minutes=config.parallel.step_timeout_minutes,
                nccl=config.parallel.nccl,
            )
            changed = replace(
                training, micro_batch_size=micro, recompute=recompute, recompute_layers=None, recompute_modules=None
            )
            yield replace(config, parallel=parallel, training=changed, precision=precision)


def _powers(limit: int) -> list[int]:
    return [1 << k for k in range(limit.bit_length()) if 1 << k <= limit]


def _stages(config: PretrainConfig) -> list[int]:
    layers = config.model.num_layers
    return [size for size in range(1, min(layers, 64) + 1) if layers % size == 0]


def _chunks(config: PretrainConfig, stages: int) -> list[int]:
    """Few chunks: beyond about five, messages cost what the bubble saves."""
    each = config.model.num_layers // stages
    return [1] if stages == 1 else [1, *(n for n in range(2, 9) if each % n == 0)]
