"""megatron-core's optimizer over AdamW, or over one of the user's, stepped only when the gradients are sound."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import to_local_if_dtensor
from torch import Tensor

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.config.extensions import is_own
from vishwamai_mp.model import VishwamAIModel
from vishwamai_mp.model.fully_sharded import FullySharded, fully_shards
from vishwamai_mp.model.offloading import offload_layers
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.runtime import Runtime, device
from vishwamai_mp.runtime.layer_graphs import gradients_can_be_captured
from vishwamai_mp.runtime.megatron_versions import gradients_for_norm
from vishwamai_mp.training.compact_adamw import is_compact, use_compact_moments
from vishwamai_mp.training.device_checks import check_device
from vishwamai_mp.training.fp8_parameters import forget_bf16, keep_in_fp8
from vishwamai_mp.training.own_optimizer import use_own_optimizer
from vishwamai_mp.training.sharded_optimizer import ShardedOptimizer
from vishwamai_mp.training.tensor_overlap import overlap_exchanges


def wrap_data_parallel(
    config: PretrainConfig, runtime: Runtime, models: Sequence[VishwamAIModel]
) -> list[DistributedDataParallel]:
    """Each model chunk with its gradients in contiguous buffers, reduced over the replicas; or fully sharded.

    Raises:
        ConfigError: a setting that this device has no use for.
    """
    check_device(config)
    if offloaded := config.training.offload_layers:
        for model in models:
            offload_layers(model.decoder.layers, offloaded)
    if config.parallel.fuse_grad_accumulation:
        _fuse_accumulation(models)
    if config.fp8.params:
        keep_in_fp8(config, models)
    if config.parallel.overlap_tensor_parallel:
        overlap_exchanges(config, models)
    if fully_shards(config, runtime.groups):
        return [FullySharded(model) for model in models]
    replicated = runtime.groups.dp_cp.size() > 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.parallel.reduce_grads_in == "fp32",
        use_distributed_optimizer=shards_optimizer(config, runtime),
        overlap_grad_reduce=config.parallel.overlap_grad_reduce and replicated,
        fp8_param_gather=config.fp8.params,
        overlap_param_gather=shards_optimizer(config, runtime)
        and config.parallel.overlap_grad_reduce
        and config.parallel.overlap_param_gather,
    )
    with gradients_can_be_captured() if config.training.cuda_graphs else nullcontext() as stream:
        chunks = [
            DistributedDataParallel(
                config=model.config,
                ddp_config=ddp,
                module=model,
                disable_bucketing=chunk > 0,  # later chunks' buckets would delay the first's
                pg_collection=runtime.groups,
            )
            for chunk, model in enumerate(models)
        ]
    for wrapped in chunks:
        wrapped.stream_of_gradients = stream  # for runtime/layer_graphs.py
    return chunks


def _fuse_accumulation(models: Sequence[VishwamAIModel]) -> None:
    """Let Transformer Engine's layers add to `main_grad` within the product that makes a weight's gradient.

    megatron-core's own field for it would ask apex of the output layer, which is megatron-core's.
    """
    for model in models:
        for module in model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


def shards_optimizer(config: PretrainConfig, runtime: Runtime) -> bool:
    """Whether the optimizer's state is split over replicas.

    With one replica there is nobody to share it with; only this optimizer of megatron-core's knows weights in FP8.
    """
    return config.parallel.use_distributed_optimizer and (runtime.groups.dp_cp.size() > 1 or config.fp8.params)


def build_optimizer(
    config: PretrainConfig, runtime: Runtime, chunks: Sequence[DistributedDataParallel]
) -> ChainedOptimizer:
    """AdamW, or `optimizer.name`, with fp32 main parameters; weight decay on matrices only.

    Raises:
        UserError: the host has no room for `optimizer.moments_on_host`.
    """
    policy, options = PrecisionPolicy.of_run(config), config.optimizer
    own = is_own(options.name)
    wanted = OptimizerConfig(
        optimizer="sgd" if own else "adam",  # a user's optimizer takes the place of megatron-core's SGD
        lr=options.learning_rate,
        min_lr=options.min_learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.epsilon,
        clip_grad=options.clip_grad_norm,
        params_dtype=policy.compute,
        fp16=policy.name == "fp16",
        bf16=policy.compute == torch.bfloat16,
        initial_loss_scale=options.initial_loss_scale,
        loss_scale_window=options.loss_scale_window,
        hysteresis=1,  # an overflow halves the loss scale: the first as well
        use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        fp8_recipe=policy.fp8.recipe if policy.fp8 and config.fp8.params else None,
    )
    if fully_shards(config, runtime.groups):
        optimizer = ChainedOptimizer([ShardedOptimizer(wanted, chunk, runtime) for chunk in chunks])
    else:
        optimizer = get_megatron_optimizer(
            wanted, list(chunks), pg_collection=runtime.groups, use_gloo_process_groups=False
        )
    forget_bf16(chunks)
    for part in optimizer.chained_optimizers if own else ():
        use_own_optimizer(part, options)
    for part in optimizer.chained_optimizers if is_compact(options) else ():
        use_compact_moments(part, options)
    for group in optimizer.param_groups:
        # megatron-core's own scheduler, which is not used here, would do this: 0 for vectors, 1 for matrices.
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
        if (
            "foreach" in group and not own
        ):  # torch's AdamW, not Transformer Engine's: its fused kernel is not its default
            group.update(fused=True, foreach=None)
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """The learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)


class ReadyGradients(NamedTuple):
    """Scalars on the device, equal on all ranks, so that all take the same decision about the step.

    Attributes:
        norm: global 2-norm of the gradients.
        fits: 1; 0: some overflowed before the loss scale was taken out (fp16), and `norm` is worth nothing.
    """

    norm: Tensor
    fits: Tensor


@torch.no_grad()
def ready_gradients(optimizer: ChainedOptimizer) -> ReadyGradients:
    """Make the gradients ready (unscaled, in fp32), and measure them without a read by the host.

    megatron-core's own functions read whether there was an overflow, and the norm: of each parameter where neither
    Transformer Engine nor apex is installed.
    """
    overflow = torch.zeros((), device=device())
    gradients: dict[dist.ProcessGroup, list[Tensor]] = {}  # by the ranks that hold parts of them
    for part in optimizer.chained_optimizers:
        scaler = _scaler(part)
        if scaler:
            part.grad_scaler = None  # meanwhile `prepare_grads` only copies
        part.prepare_grads()
        group = part.get_grad_stats_parallel_group()
        if scaler:
            part.grad_scaler = scaler
            overflow = torch.maximum(overflow, _unscale(part, group).squeeze())
        gradients.setdefault(group, []).extend(gradients_for_norm(part))
    squares = []
    for group, own in gradients.items():
        norms = torch.stack(torch._foreach_norm(own)) if own else torch.zeros(1, device=device())
        squares.append(torch.linalg.vector_norm(norms).square())
        dist.all_reduce(squares[-1], group=group)
    return ReadyGradients(torch.stack(squares).double().sum().sqrt(), (overflow == 0).double())


def _scaler(part: MegatronOptimizer) -> Any:
    return getattr(part, "grad_scaler", None)


def _unscale(part: Any, group: dist.ProcessGroup) -> Tensor:
    """Take the loss scale out of the gradients of an optimizer, and tell whether any was not finite (above 0)."""
    part.found_inf.zero_()
    if not part.is_stub_optimizer:
        gradients = part._collect_main_grad_data_for_unscaling()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, part.found_inf, part.grad_scaler.inv_scale)
    dist.all_reduce(part.found_inf, dist.ReduceOp.MAX, group=group)
    return part.found_inf


def update_loss_scale(optimizer: ChainedOptimizer, overflow: bool) -> None:
    """Tell what chooses the loss scale (fp16) whether the step's gradients overflowed."""
    for part in optimizer.chained_optimizers:
        if scaler := _scaler(part):
            scaler.update(overflow)


def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """`ready_gradients` for a program that may wait: the norm; inf after an fp16 overflow."""
    norm, fits = (float(scalar) for scalar in ready_gradients(optimizer))
    update_loss_scale(optimizer, fits == 0)
    return norm if fits else float("inf")


@torch.no_grad()
def clip_and_step(optimizer: ChainedOptimizer, norm: float, max_norm: float) -> None:
    """Scale gradients of norm `norm` down to `max_norm` (0: as they are) and update the parameters.

    The factor is megatron-core's, whose own way writes every gradient twice where Transformer Engine is not installed.
    """
    factor = max_norm / (norm + 1e-6)
    if max_norm > 0 and factor < 1:
        parts = (part for part in optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False))
        parameters = (parameter for part in parts for parameter in part.get_parameters())
        gradients = [to_local_if_dtensor(one.grad) for one in parameters if one.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)
    optimizer.step_with_ready_grads()
