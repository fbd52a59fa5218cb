"""What of a model and its optimizer is stored, under which names, independent of the layout.

A tensor's name is its parameter's in the whole model (`decoder.layers.7.mlp.linear_fc1.weight`), whatever stage and
chunk hold it; the optimizer's have `optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.` in front. Main parameters of an
fp32 model are its parameters and are not stored twice. The optimizer's step and loss scale are stored apart, as JSON;
its hyperparameters are not stored: the configuration says them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vishwamai_mp.checkpoint.manifest import is_optimizer
from vishwamai_mp.config.finetuning import ADAPTER_STATE, VALUE_HEAD_STATE
from vishwamai_mp.config.resolve_fp8 import SCALING_STATE
from vishwamai_mp.runtime import Runtime  # before megatron.core

# isort: split
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from vishwamai_mp.checkpoint import optimizer_shards
from vishwamai_mp.checkpoint.optimizer_shards import MAIN
from vishwamai_mp.model.fully_sharded import FullySharded

_MAY_BEGIN = (*ADAPTER_STATE, *VALUE_HEAD_STATE)
_SHARDS = "shards"  # the place of the distributed optimizer's tensors beside its settings


def model_state(chunks: Sequence[nn.Module], runtime: Runtime) -> dict[str, Any]:
    """The model's sharded tensors, one entry per chunk of this rank."""
    metadata, state = _metadata(runtime), {}
    for i, model in enumerate(map(unwrap, chunks)):
        items = model.sharded_state_dict(metadata=metadata)
        if model.sharding:  # fp32 in memory; in a checkpoint as in any other layout
            items = {name: _of_type(item, model.sharding.compute) for name, item in items.items()}
        items = {name: _as_numbers(item) for name, item in items.items()}
        state[f"model{i}"] = items
    return state


def load_model(chunks: Sequence[nn.Module], loaded: dict[str, Any]) -> None:
    """Put what `model_state` asked for into the model."""
    for i, model in enumerate(map(unwrap, chunks)):
        given = loaded[f"model{i}"]
        if model.sharding:
            for name, item in model.sharded_state_dict().items():
                if name in given or not item.key.endswith(_MAY_BEGIN):
                    item.data.copy_(given[name])
            continue
        result = model.load_state_dict(given, strict=False)
        # A checkpoint of another precision lacks these scaling factors; they form anew. The others may begin on it.
        fresh = ("_extra_state", *SCALING_STATE, *_MAY_BEGIN)
        missing = [key for key in result.missing_keys if not key.endswith(fresh)]
        assert not missing, missing
        assert not result.unexpected_keys, result.unexpected_keys


def optimizer_state(
    optimizer: MegatronOptimizer, model: dict[str, Any], runtime: Runtime, is_loading: bool
) -> dict[str, Any]:
    """The optimizer's sharded tensors and, as megatron-core wants them back at loading, its hyperparameters.

    Args:
        optimizer: megatron-core's, chained or not.
        model: from `model_state`.
        runtime: process groups.
        is_loading: whether tensors are to be filled rather than read.
    """
    state = {}
    for i, part in enumerate(_parts(optimizer)):
        if _trains_nothing(part):
            continue
        _fill_state(part)
        if isinstance(part, DistributedOptimizer):
            state[f"optimizer{i}"] = {**part.state_dict(), _SHARDS: optimizer_shards.shards_of(part, model)}
        else:
            state[f"optimizer{i}"] = part.sharded_state_dict(model, is_loading, metadata=_metadata(runtime))
    return state


def load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any], scalars: Sequence[dict[str, Any]]) -> None:
    """Put what `optimizer_state` asked for, and the step and loss scale, into the optimizer."""
    for i, (part, saved) in enumerate(zip(_parts(optimizer), scalars, strict=True)):
        if _trains_nothing(part):
            continue
        state = loaded[f"optimizer{i}"]
        _set_step(part, state, saved["step"])
        scaler = getattr(part, "grad_scaler", None)
        if scaler and saved["grad_scaler"]:
            state["grad_scaler"] = _like(scaler.state_dict(), saved["grad_scaler"])
        if isinstance(part, DistributedOptimizer):
            del state[_SHARDS]  # they are the optimizer's own tensors
            part.load_state_dict(state)
            optimizer_shards.put_loaded(part)
        else:
            part.load_state_dict(state)


@torch.no_grad()
def restart_optimizer(optimizer: MegatronOptimizer, chunks: Sequence[nn.Module], loaded: dict[str, Any]) -> None:
    """Let the optimizer's main parameters begin as the weights that `load_model` put into the model.

    Those of weights in FP8 begin as the numbers that were loaded, not as what became of them when they were rounded.
    """
    optimizer.reload_model_params()
    numbers = {
        id(weight): loaded[f"model{i}"][name]
        for i, model in enumerate(map(unwrap, chunks))
        for name, weight in model.named_parameters()
        if is_float8tensor(weight)
    }
    for part in _parts(optimizer):
        if numbers and isinstance(part, DistributedOptimizer):
            optimizer_shards.begin_with(part, numbers)


def optimizer_scalars(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """Step and loss scaler of each part of the optimizer, as plain values. Collective."""
    parts = _parts(optimizer)
    counted: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counted, [_step(part) for part in parts])  # where all is frozen, nothing counts
    steps = [max(counts) for counts in zip(*counted, strict=True)]
    return [{"step": step, "grad_scaler": _plain_scaler(part)} for part, step in zip(parts, steps, strict=True)]


def without_redundant(state: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """What is to be saved of `optimizer_state`: sharded values only, without copies of an fp32 model's parameters."""
    in_fp32 = {
        item.key
        for item in nested_values(model)
        if isinstance(item, ShardedBase) and getattr(item.data, "dtype", None) == torch.float32
    }

    def is_kept(item: Any) -> bool:
        if not isinstance(item, ShardedBase):
            return False
        return not (item.key.startswith(MAIN) and item.key.removeprefix(MAIN) in in_fp32)

    return extract_matching_values(state, is_kept)[0]


def split_request(state: dict[str, Any], tensors: Mapping[str, tuple[int, ...]], objects: set[str]) -> "SplitRequest":
    """Compare what is wanted with what a checkpoint has (its tensors' shapes by name, names of its objects)."""
    plain, wanted = _split(state, lambda item: not isinstance(item, ShardedBase | LocalNonpersistentObject))

    def is_borrowed(item: Any) -> bool:
        key = getattr(item, "key", "")
        return key.startswith(MAIN) and key not in tensors and key.removeprefix(MAIN) in tensors

    borrowed, wanted = _split(wanted, is_borrowed)
    for item in nested_values(borrowed):
        item.key = item.key.removeprefix(MAIN)
    _, wanted = _split(wanted, lambda item: isinstance(item, ShardedObject) and item.unique_key not in objects)

    def is_new_scaling(item: Any) -> bool:
        key = getattr(item, "key", "")
        return key.endswith(SCALING_STATE) and tensors.get(key) != tuple(item.global_shape)

    _, wanted = _split(wanted, is_new_scaling)  # another precision, or another length of history

    def begins(item: Any) -> bool:
        key = getattr(item, "key", "")
        return key.endswith(_MAY_BEGIN) and key not in tensors

    _, wanted = _split(wanted, begins)  # whether any may was checked before
    named = [item for item in nested_values(wanted) if isinstance(item, ShardedBase)]
    missing = [item.key for item in named if not isinstance(item, ShardedObject) and item.key not in tensors]
    return SplitRequest(wanted, borrowed, plain, sorted(set(missing)))


def names_of(state: dict[str, Any]) -> set[str]:
    """The names under which this rank's parts of a state dict are stored."""
    return {item.key for item in nested_values(state) if isinstance(item, ShardedBase)}


def may_be_left(tensor: str) -> bool:
    """Whether a model without a place for a tensor of this name is as good as it was with it.

    A value head is for searches, scaling factors are a precision's own, and the optimizer's state is asked for or not.
    """
    return is_optimizer(tensor) or tensor.endswith((*VALUE_HEAD_STATE, *SCALING_STATE))


class SplitRequest:
    """Parts of a state dict to load: `wanted` under their names; `borrowed` main parameters, read from the model's
    tensors; `plain` values that are kept; and the names that the checkpoint lacks."""

    def __init__(self, wanted: dict, borrowed: dict, plain: dict, missing: list[str]) -> None:
        self.wanted, self.borrowed, self.plain, self.missing = wanted, borrowed, plain, missing

    def join(self, loaded: dict[str, Any], borrowed: dict[str, Any]) -> dict[str, Any]:
        """The whole state dict, from the parts as loaded."""
        return merge(merge(self.plain, loaded), borrowed)


def unwrap(chunk: nn.Module) -> Any:
    """The model inside megatron-core's wrappers."""
    while isinstance(chunk, DistributedDataParallel | Float16Module | FullySharded):
        chunk = chunk.module
    return chunk


def gather_parameters(chunks: Sequence[nn.Module]) -> None:
    """Complete the parameters of a distributed optimizer that gathers them only during the next forward pass."""
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _metadata(runtime: Runtime) -> dict[str, Any]:
    return {
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,  # layers by number: they need not be alike
        "dp_cp_group": runtime.groups.dp_cp,
    }


def _of_type(item: ShardedTensor, dtype: torch.dtype) -> ShardedTensor:
    return item if item.dtype == dtype else replace(item, data=item.data.to(dtype), dtype=dtype)


def _as_numbers(item: Any) -> Any:
    """Of weights in FP8 the bf16 numbers that they stand for, as checkpoints have them; `load_model` rounds them again.

    Parts of the numbers are views of them, parts of the codes are not views of what is loaded.
    """
    codes: Any = getattr(item, "data", None)
    if not is_float8tensor(codes):
        return item
    numbers = codes.detach().dequantize()
    numbers.stands_for = codes
    return replace(item, data=numbers)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def _trains_nothing(part: Any) -> bool:
    """Whether all parameters of this rank's stage are frozen."""
    if isinstance(part, DistributedOptimizer):
        return not part.buffers  # of a parameter, another replica may have all rows
    return not any(group["params"] for group in part.optimizer.param_groups)


def _is_torch_adam(part: Any) -> bool:
    return isinstance(part.optimizer, torch.optim.Adam)  # AdamW is one


def _counts_per_parameter(part: Any) -> bool:
    """Whether updates are counted in each parameter's state, as torch's optimizers do, or not."""
    return any("step" in state for state in part.optimizer.state.values())


def _fill_state(part: Any) -> None:
    """Give an optimizer that has not stepped yet its zero state: megatron-core saves and loads only what is there."""
    part.init_state_fn(part.optimizer, part.config)
    if _is_torch_adam(part):
        for param, state in part.optimizer.state.items():
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)


def _step(part: Any) -> float:
    """Updates done. torch's Adam counts per parameter, Transformer Engine's per group, some do not count."""
    counted = [*part.optimizer.state.values()] if _counts_per_parameter(part) else part.optimizer.param_groups
    return float(next((item["step"] for item in counted if "step" in item), 0))


def _set_step(part: Any, state: dict[str, Any], step: float) -> None:
    inner = state if "param_groups" in state else state["optimizer"]
    inner.setdefault("state", {})  # that of an optimizer which keeps nothing is not loaded
    if _counts_per_parameter(part) and not isinstance(part, DistributedOptimizer):
        inner["state"]["common_step"] = torch.tensor(step)
        return
    for group in inner["param_groups"]:
        group["step"] = int(step)


def _plain_scaler(part: Any) -> dict[str, Any] | None:
    scaler = getattr(part, "grad_scaler", None)
    if not scaler:
        return None
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in scaler.state_dict().items()}


def _like(template: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` with tensors where `template` has them."""
    return {
        key: torch.tensor(values[key], dtype=old.dtype, device=old.device) if isinstance(old, Tensor) else values[key]
        for key, old in template.items()
    }


def _split(state: dict[str, Any], predicate: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return extract_matching_values(state, predicate)
