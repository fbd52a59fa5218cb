"""What a rank of megatron-core's distributed optimizer holds, as parts of whole tensors: nobody gathers anything.

Each replica keeps a stretch of each parameter's numbers, row after row, and these make up to three boxes of a matrix:
the rest of a row, whole rows, the beginning of one. A checkpoint has every box at its place in the whole, under the
name that the state has in any layout. megatron-core's own form that changes layout (`fully_reshardable`) gathers the
whole optimizer's state into the host memory of every process instead.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

PREFIX = "optimizer.state."
MAIN = PREFIX + "fp32_param."
_NAMES = {"param": "fp32_param"}  # the optimizer's name for a parameter's main copy


def shards_of(part: DistributedOptimizer, model: dict[str, Any]) -> dict[str, ShardedTensor]:
    """The state of this rank's stretches; the data are views of it, to be read or to be filled.

    Args:
        part: the optimizer, whose state is there.
        model: the sharded tensors of its parameters, as `sharded.model_state` has them.
    """
    given = nested_values(extract_sharded_tensors_and_factories(model)[0])
    entries = {id(getattr(entry.data, "stands_for", entry.data)): entry for entry in given}
    found: dict[str, ShardedTensor] = {}
    for parameter, stretch in _stretches(part):
        whole = entries[id(parameter)]
        leaves = nested_values(whole.build()) if isinstance(whole, ShardedTensorFactory) else [whole]
        for leaf in leaves:
            for name, tensor in _state_of(part, parameter).items():
                for piece in _pieces(leaf, whole.data, stretch, tensor):
                    piece.key = f"{PREFIX}{_NAMES.get(name, name)}.{piece.key}"
                    found[f"{piece.key}#{len(found)}"] = piece
    return found


def put_loaded(part: DistributedOptimizer) -> None:
    """After `load_state_dict`: what was loaded into `shards_of` is each parameter's own, with a step of its own."""
    for parameter, _ in _stretches(part):
        part._set_main_param_and_optimizer_states(parameter, _state_of(part, parameter))


def begin_with(part: DistributedOptimizer, numbers: dict[int, Tensor]) -> None:
    """Let main parameters begin anew.

    Args:
        part: the optimizer.
        numbers: whole parameters of this rank, by id.
    """
    for parameter, stretch in _stretches(part):
        if id(parameter) in numbers:
            own = numbers[id(parameter)].reshape(-1)[stretch.start : stretch.stop]
            part._get_main_param_and_optimizer_states(parameter)["param"].copy_(own)


def _stretches(part: DistributedOptimizer) -> Iterator[tuple[Tensor, range]]:
    """Parameters of which this rank has some numbers, and which, counted from the parameter's first."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, range(ranges["param"].start, ranges["param"].end)


def _state_of(part: DistributedOptimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = part._get_main_param_and_optimizer_states(parameter)
    return {name: tensor.detach() for name, tensor in state.items() if name != "step"}


def _pieces(leaf: ShardedTensor, whole: Tensor, stretch: range, state: Tensor) -> Iterator[ShardedTensor]:
    """What `state`, of the stretch, has of one part of the parameter (one matrix of a fused pair, or all of it)."""
    assert leaf.prepend_axis_num == 0, leaf
    assert leaf.data.is_contiguous(), leaf
    first = leaf.data.storage_offset() - whole.storage_offset()  # where in the parameter the part begins
    low, high = max(stretch.start, first), min(stretch.stop, first + leaf.data.numel())
    if low >= high:
        return
    own = state[low - stretch.start : high - stretch.start]
    for offsets, shape, start in boxes(tuple(leaf.local_shape), low - first, high - first):
        yield replace(
            leaf,
            data=own[start : start + math.prod(shape)].view(shape),
            dtype=own.dtype,
            local_shape=shape,
            global_offset=tuple(map(sum, zip(leaf.global_offset, offsets, strict=True))),
            axis_fragmentations=None,  # boxes are not alike
            replica_id=(*leaf.replica_id[:-1], 0),  # of the replicas no other has this stretch
        )


Box = tuple[tuple[int, ...], tuple[int, ...], int]


def boxes(shape: tuple[int, ...], low: int, high: int) -> Iterator[Box]:
    """Cut the numbers `low` to `high` of a tensor, counted row after row, into boxes.

    Yields:
        where a box begins, its shape, and how many of the numbers come before it.
    """
    if len(shape) <= 1:
        yield (low,) * len(shape), (high - low,) * len(shape), 0
        return
    row = math.prod(shape[1:])
    start = low
    while start < high:
        index, within = divmod(start, row)
        rows = (high - start) // row
        if within == 0 and rows:
            yield (index, *[0] * (len(shape) - 1)), (rows, *shape[1:]), start - low
            start += rows * row
            continue
        stop = min(high, (index + 1) * row)
        for offsets, inner, before in boxes(shape[1:], within, stop - index * row):
            yield (index, *offsets), (1, *inner), start - low + before
        start = stop
