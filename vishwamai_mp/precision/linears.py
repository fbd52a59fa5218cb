"""Linear layers as CPUs compute them: FP8 and NVFP4 emulated, fp32 by the faster library, 16 bits widened at need.

Widening: the operands are multiplied in fp32 and the product rounded once, what a tensor core does, and some hundred
times faster than the scalar fallback. Shapes: T tokens (local under sequence parallelism), B batch, I in, O out
(local).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from vishwamai_mp.precision.collectives import gather_sequence, reduce_input_gradient
from vishwamai_mp.precision.delayed import DelayedScaling
from vishwamai_mp.precision.extra_state import keep_scaling, refuse_pickles
from vishwamai_mp.precision.fp8_linear import (
    BlockScaling,
    CurrentScaling,
    DelayedLayerScaling,
    MXScaling,
    Nvfp4Scaling,
    Scaling,
    emulate_fp8,
    replace_product,
)
from vishwamai_mp.precision.policy import Fp8Policy, PrecisionPolicy
from vishwamai_mp.precision.rounding_bits import GradientPlaces
from vishwamai_mp.precision.statistics import named_fp8_linears
from vishwamai_mp.runtime import device, is_accelerator, multiplies_natively
from vishwamai_mp.runtime.products import (
    input_gradient_fp32,
    linear_fp32,
    skinny_linear,
    weight_gradient_fp32,
)

_log = logging.getLogger(__name__)


def computes_in_fp32(policy: PrecisionPolicy) -> bool:
    """Whether a CPU multiplies matrices of this policy in fp32: they are, or it has no hardware for what they are."""
    return not is_accelerator(device()) and (policy.compute == torch.float32 or not multiplies_natively(policy.compute))


def use_arithmetic(model: nn.Module, policy: PrecisionPolicy) -> None:
    """Give all parallel linear layers of `model` the arithmetic of `policy`.

    Where hardware has it, only Transformer Engine's layers are touched: those that FP8 does not fit stay in bf16, and
    what they remember becomes plain tensors in checkpoints. With FP8, `model` is a stage or chunk of the whole: the
    linear layers within its decoder are the ones it is for.
    """
    if computes_in_fp32(policy):
        for module in parallel_linears(model):
            replace_product(module, _Fp32Linear.apply)
    if policy.fp8 is not None:
        linears = fp8_linears(model, policy)
        _leave_others_in_bf16(model, policy)
        if any(hasattr(linear, "fp8_meta") for linear in linears.values()):
            if policy.fp8.recipe == "delayed":
                keep_scaling(list(linears.values()), get_fp8_recipe(model.config))
        elif linears:
            _emulate_fp8(model, linears, policy.fp8)
    refuse_pickles(model)


def parallel_linears(module: nn.Module) -> list[Any]:
    """megatron-core's own parallel linear layers within a module, in order."""
    return [part for part in module.modules() if isinstance(part, ColumnParallelLinear | RowParallelLinear)]


def begin_step(models: Sequence[Any], seed: int, step: int) -> None:
    """Let emulated layers of this rank's model chunks draw a training step's random numbers.

    Args:
        models: unwrapped.
        seed: of the run.
        step: from 0.
    """
    for _, linear in named_fp8_linears(models):
        linear.fp8_scaling.begin_step(seed, step)


def fp8_linears(model: Any, policy: PrecisionPolicy) -> dict[str, Any]:
    """The linear layers that compute in FP8 or NVFP4, by name in the whole model: those of attention, MLP and
    components of the policy's layers, if they are made of whole blocks."""
    return {name: part for name, part, fits in _in_fp8_layers(model, policy) if fits}


def _in_fp8_layers(model: Any, policy: PrecisionPolicy) -> Iterator[tuple[str, Any, bool]]:
    """Name in the whole model, linear layer, and whether it is made of whole blocks."""
    fp8 = policy.fp8
    assert fp8 is not None
    for layer in model.decoder.layers:
        if not fp8.applies_to(layer.layer_number - 1, model.config.num_layers):
            continue
        for name, part in layer.named_modules():
            if isinstance(part, ColumnParallelLinear | RowParallelLinear) or _is_transformer_engine_linear(part):
                fits = all(size % fp8.multiple == 0 for size in part.weight.shape)
                yield f"layers.{layer.layer_number - 1}.{name}", part, fits


def _leave_others_in_bf16(model: Any, policy: PrecisionPolicy) -> None:
    """On a GPU as on a CPU; and say which they are."""
    left = {name: part for name, part, fits in _in_fp8_layers(model, policy) if not fits}
    for part in left.values():
        if _is_transformer_engine_linear(part):
            _leave_in_bf16(part)
    groups = model.pg_collection
    if left and policy.fp8 and groups.tp.rank() == groups.dp_cp.rank() == 0:
        shapes = ", ".join(f"{name} {' × '.join(map(str, part.weight.shape))}" for name, part in left.items())
        _log.warning(
            "precision=%s: widths that are not multiples of %d stay in bf16: %s",
            policy.name,
            policy.fp8.multiple,
            shapes,
        )


def _is_transformer_engine_linear(part: Any) -> bool:
    weight = getattr(part, "weight", None)
    return hasattr(part, "fp8_meta") and isinstance(weight, Tensor) and weight.dim() == 2


def _leave_in_bf16(linear: Any) -> None:
    """Let a layer of Transformer Engine ignore that its surroundings compute in FP8."""
    from transformer_engine.pytorch import fp8_autocast

    forward = linear.forward

    def forward_in_bf16(*args: Any, **options: Any) -> Any:
        with fp8_autocast(enabled=False):
            return forward(*args, **options)

    linear.forward = forward_in_bf16


def _emulate_fp8(model: Any, linears: Mapping[str, Any], fp8: Fp8Policy) -> None:
    if fp8.recipe == "delayed":
        length, algorithm = fp8.amax_history_length, fp8.amax_algorithm
        group = model.pg_collection.tp_dp_cp
        shared = DelayedScaling(model.decoder, list(linears.values()), group, length, algorithm)
        for index, linear in enumerate(linears.values()):
            emulate_fp8(linear, DelayedLayerScaling(shared, index))
        return
    if fp8.recipe == "nvfp4":
        groups = model.pg_collection
        for name, linear in linears.items():
            gated = name.endswith(".linear_fc1") and model.config.gated_linear_unit
            places = GradientPlaces(outputs_of(linear, gated, groups.tp), groups.cp, groups.dp)
            emulate_fp8(linear, Nvfp4Scaling(name, places))
        return
    kinds: dict[str, type[Scaling]] = {"tensorwise": CurrentScaling, "blockwise": BlockScaling, "mxfp8": MXScaling}
    scaling = kinds[fp8.recipe]()
    for linear in linears.values():
        emulate_fp8(linear, scaling)


def outputs_of(linear: Any, gated: bool, group: dist.ProcessGroup) -> Tensor:
    """The numbers in the whole model of a linear layer's outputs on this rank; first gates, then what they multiply."""
    own = torch.arange(linear.weight.shape[0], device=device())
    if isinstance(linear, RowParallelLinear):
        return own
    if not gated:
        return own + group.rank() * len(own)
    half = len(own) // 2
    gates = own[:half] + group.rank() * half
    return torch.cat((gates, gates + group.size() * half))


class _Fp32Linear(torch.autograd.Function):
    """y = x Wᵀ, with megatron-core's collectives: gather the sequence, reduce (or reduce-scatter) the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_TBI: Tensor, w_OI: Tensor, reduce: bool, sequence_parallel: bool, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(x_TBI if ctx.needs_input_grad[1] else None, w_OI)  # a frozen weight needs no input
        ctx.shape, ctx.dtype = x_TBI.shape, x_TBI.dtype
        ctx.reduce, ctx.sequence_parallel, ctx.group = reduce, sequence_parallel, group
        x = gather_sequence(x_TBI, group) if sequence_parallel else x_TBI
        if not any(ctx.needs_input_grad):
            out = skinny_linear(x.flatten(0, -2), w_OI)
            return out.contiguous().view(*x.shape[:-1], -1)
        return linear_fp32(_wide(x), _wide(w_OI)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TBI, w_OI = ctx.saved_tensors
        grad = _wide(grads[0])
        x = gather_sequence(x_TBI, ctx.group) if ctx.sequence_parallel and x_TBI is not None else x_TBI
        dx = input_gradient_fp32(grad, _wide(w_OI)).to(ctx.dtype)
        dx, pending = reduce_input_gradient(dx, ctx.shape, ctx.reduce, ctx.sequence_parallel, ctx.group)
        dw = None
        if x is not None:
            dw = weight_gradient_fp32(grad.flatten(0, -2), _wide(x).flatten(0, -2)).to(w_OI.dtype)
        if pending:
            pending.wait()
        return dx, dw, None, None, None


def _wide(x: Tensor) -> Tensor:
    """In fp32; fp64, which tests use, stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
