"""Whether the shards that a job's ranks hold make up the model: each number of it once, none twice, none missing."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from vishwamai_mp.checkpoint.sharded import model_state
from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime.simulated import simulated_job
from vishwamai_mp.training.optimizer import wrap_data_parallel

_TOLD = 10  # faults that are named

Box = tuple[tuple[int, int], ...]  # first and last + 1 of each dimension


@dataclass(frozen=True)
class Tiling:
    """What was found.

    Attributes:
        ranks: that were built: of replicas, the first.
        tensors: of the model.
        numbers: in all of them.
        faults: a line each; none: the shards tile the model.
    """

    ranks: int
    tensors: int
    numbers: int
    faults: list[str]


def check_tiling(config: PretrainConfig, world_size: int, progress: Callable[[int], None] = lambda _: None) -> Tiling:
    """Build every rank's share of the model on the simulated device, and lay the shares together.

    Args:
        config: resolved for `world_size`.
        world_size: ranks of the job.
        progress: called with each rank that was built.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    shards: dict[str, list[tuple[Box, int]]] = defaultdict(list)
    faults, ranks = [], _distinct_ranks(config, world_size)
    for rank in ranks:
        for tensor in _shares(config, world_size, rank):
            shape = shapes.setdefault(tensor.key, tensor.global_shape)
            if shape != tensor.global_shape:
                faults.append(f"{tensor.key}: {list(tensor.global_shape)} on rank {rank}, {list(shape)} on others")
            if not any(tensor.replica_id if isinstance(tensor.replica_id, tuple) else (tensor.replica_id,)):
                corners = zip(tensor.global_offset, tensor.data.shape, strict=True)
                shards[tensor.key].append((tuple((first, first + size) for first, size in corners), rank))
        progress(rank)
    for key, shape in shapes.items():
        faults += shard_faults(key, shape, shards[key])
    numbers = sum(math.prod(shape) for shape in shapes.values())
    return Tiling(len(ranks), len(shapes), numbers, faults[:_TOLD])


def _distinct_ranks(config: PretrainConfig, world_size: int) -> list[int]:
    """Those that hold different shards. Tensor parallel ranks are next to each other, stages farthest apart."""
    if config.parallel.fully_sharded:
        return list(range(world_size))
    stages = config.parallel.pipeline_model_parallel_size
    tensor = config.parallel.tensor_model_parallel_size
    return [stage * world_size // stages + own for stage in range(stages) for own in range(tensor)]


def _shares(config: PretrainConfig, world_size: int, rank: int) -> Iterator[ShardedTensor]:
    with simulated_job(config, world_size, rank) as job:
        chunks = wrap_data_parallel(config, job.runtime, build_model(config, job.runtime, initialize=False))
        for entry in nested_values(model_state(chunks, job.runtime)):
            parts = nested_values({"": entry.build()}) if isinstance(entry, ShardedTensorFactory) else [entry]
            yield from (part for part in parts if isinstance(part, ShardedTensor))


def shard_faults(key: str, shape: tuple[int, ...], shards: list[tuple[Box, int]]) -> Iterator[str]:
    """What is wrong with a tensor's shards, each a place and the rank that holds it; a line each."""
    volume = 0
    for i, (box, rank) in enumerate(shards):
        volume += math.prod(last - first for first, last in box)
        if any(last > size for (_, last), size in zip(box, shape, strict=True)):
            yield f"{key}: rank {rank} holds {list(box)}, beyond {list(shape)}"
        for other, owner in shards[:i]:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                yield f"{key}: ranks {owner} and {rank} both hold a part of {list(box)}"
                break
    if (missing := math.prod(shape) - volume) > 0:
        yield f"{key}: {missing:,} of {math.prod(shape):,} numbers are on no rank"
