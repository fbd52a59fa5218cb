"""Fully sharded data parallelism (FSDP, arXiv 2304.11277) by torch's `fully_shard`.

Of every parameter each replica keeps some rows, in fp32: the optimizer's main weights; and the gradients of these rows.
A layer's parameters are gathered before it runs, in the type that it computes in, and freed after; its gradients are
summed to the replicas that keep them. The unit is the layer; embedding, output layer and what else is left make one
more, gathered for the whole pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vishwamai_mp.config import ConfigError, PretrainConfig
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.runtime import device


def fully_shards(config: PretrainConfig, groups: ProcessGroupCollection) -> bool:
    """Whether parameters are split over the replicas. With one replica there is nobody to share them with."""
    return config.parallel.fully_sharded and groups.dp_cp.size() > 1


class ParameterSharding:
    """Splits the parameters of modules over replicas.

    Args:
        compute: type of gathered parameters.
        group: the replicas.
        reduced: type of gradients on their way to the replicas that keep them; there sums are fp32.
    """

    def __init__(self, compute: torch.dtype, group: dist.ProcessGroup, reduced: torch.dtype = torch.float32) -> None:
        if not hasattr(FSDPModule, "set_custom_reduce_scatter"):
            raise ConfigError(
                f"parallel.fully_sharded=true: torch {torch.__version__} is too old for it; install the version that"
                " constraints.txt names, or set it to false"
            )
        self.compute, self.gradients = compute, GradientSum()
        from torch.distributed.tensor import debug  # takes torch's compiler along: a second of every program's start

        # torch keeps what it found out by meshes that compare equal: of an earlier session too, whose groups are gone.
        debug._clear_sharding_prop_cache()
        self._mesh = DeviceMesh.from_group(group, device().type)
        # Nothing is cast but parameters: angles and losses are fp32 on purpose.
        self._types = MixedPrecisionPolicy(compute, reduced, cast_forward_inputs=False)

    @classmethod
    def of(cls, config: PretrainConfig, groups: ProcessGroupCollection) -> "ParameterSharding | None":
        """What the configuration asks for; None: parameters stay whole."""
        compute = PrecisionPolicy.of_run(config).compute
        reduced = torch.float32 if config.parallel.reduce_grads_in == "fp32" else torch.bfloat16
        return cls(compute, groups.dp_cp, reduced) if fully_shards(config, groups) else None

    def __call__(self, module: nn.Module) -> None:
        """Split the parameters of a module, without those of its parts that are split already."""
        sharded = fully_shard(module, mesh=self._mesh, mp_policy=self._types)
        sharded.set_custom_reduce_scatter(self.gradients)  # type: ignore[arg-type]  # an interface of torch's own

    @torch.no_grad()
    def round_parameters(self, module: nn.Module) -> None:
        """Give fresh parameters values that `compute` knows, so that a model starts alike however it is laid out."""
        for parameter in module.parameters():
            local = parameter.to_local()  # type: ignore[attr-defined]
            local.copy_(local.to(self.compute))


class GradientSum:
    """torch's `ReduceScatter`: adds gradients up over the replicas, for the step divides by its tokens itself.

    Attributes:
        finite: whether all that this rank has added is; None: not looked at.
    """

    def __init__(self) -> None:
        self.finite: Tensor | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        if self.finite is not None:
            self.finite &= torch.isfinite(input_tensor).all()
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, dist.ReduceOp.SUM, group, async_op)


class FullySharded(_BaseDataParallel):
    """A model with split parameters, as megatron-core's schedules and `TrainStep` know data parallel models."""

    def __init__(self, model: Any) -> None:
        super().__init__(config=model.config, module=model)
        self.ddp_config = DistributedDataParallelConfig()

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        output = self.module(*inputs, **options)
        if not torch.is_grad_enabled():
            self.module.reshard()  # otherwise backward does
        return output

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Each backward pass has summed its gradients already."""

    @torch.no_grad()
    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.to_local().mul_(scaling_factor)

    def zero_grad_buffer(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    @contextmanager
    def watched_gradients(self) -> Iterator[GradientSum]:
        """Look at what this rank adds to gradients: `finite` of the result."""
        gradients: GradientSum = self.module.sharding.gradients
        gradients.finite = torch.ones((), dtype=torch.bool, device=device())
        try:
            yield gradients
        finally:
            gradients.finite = None


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[dict[int, DTensor]]:
    """Meanwhile the model's split parameters are whole, though without memory (on the meta device).

    Yields:
        the split parameter of each, by its storage's address.
    """
    split: list[tuple[nn.Module, str, Any]] = []
    by_storage: dict[int, DTensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                whole = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
                by_storage[whole.untyped_storage()._cdata] = parameter
                split.append((module, name, parameter))
                module._parameters[name] = whole
    try:
        yield by_storage
    finally:
        for module, name, parameter in split:
            module._parameters[name] = parameter


def own_rows(entries: dict[str, Any], split: dict[int, DTensor]) -> dict[str, Any]:
    """Of a sharded state dict of `whole_parameters`, the rows that this rank holds.

    Args:
        entries: megatron-core's; fused matrices as factories of their parts.
        split: from `whole_parameters`.

    Returns:
        entries by name; of a parameter in parts, `name#0`, `name#1`, … Their data are views of the parameters.
    """
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        parts = list(nested_values({"": entry.build()})) if isinstance(entry, ShardedTensorFactory) else [entry]
        for index, part in enumerate(parts):
            data = getattr(part, "data", None)
            parameter = split.get(data.untyped_storage()._cdata) if isinstance(data, Tensor) else None
            if parameter is None:
                found[name] = entry
            elif (rows := _own_rows(part, parameter)) is not None:
                found[f"{name}#{index}"] = rows
    return found


def _own_rows(part: ShardedTensor, parameter: DTensor) -> ShardedTensor | None:
    """The rows of `part`, some rows of a whole parameter, that this rank's share of the parameter has."""
    assert part.prepend_axis_num == 0
    local = parameter.to_local().detach()
    mesh = parameter.device_mesh
    first = mesh.get_local_rank() * -(-parameter.shape[0] // mesh.size())  # as torch.chunk splits
    start = part.data.storage_offset() // part.data.stride(0)
    low, high = max(start, first), min(start + part.data.shape[0], first + local.shape[0])
    if low >= high:
        return None
    data = local[low - first : high - first]
    return replace(
        part,
        data=data,
        local_shape=tuple(data.shape),
        global_offset=(part.global_offset[0] + low - start, *part.global_offset[1:]),
        axis_fragmentations=None,  # shares need not be equal
        replica_id=0,
    )
