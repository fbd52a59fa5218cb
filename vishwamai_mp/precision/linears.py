"""16-bit linear layers on CPUs that cannot multiply 16-bit matrices in hardware.

The operands are widened to fp32, multiplied there and rounded once: what a tensor core does, and some hundred times
faster than the scalar fallback. Shapes: T tokens (local under sequence parallelism), B batch, I in, O out (local).
"""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from vishwamai_mp.precision.policy import PrecisionPolicy
from vishwamai_mp.runtime import multiplies_natively


def computes_in_fp32(policy: PrecisionPolicy) -> bool:
    """Whether matrices of this policy are multiplied faster after widening to fp32 (a CPU without the hardware)."""
    return not multiplies_natively(policy.compute)


def use_cpu_arithmetic(model: nn.Module, policy: PrecisionPolicy) -> None:
    """Give all parallel linear layers of `model` the arithmetic of `policy`. Changes nothing where hardware has it."""
    if computes_in_fp32(policy):
        for module in model.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module._forward_impl = MethodType(_widened_forward, module)


def _widened_forward(
    _: nn.Module,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    allreduce_dgrad: bool = False,
    sequence_parallel: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    **__: Any,
) -> Tensor:
    output = _WidenedLinear.apply(input, weight, allreduce_dgrad, sequence_parallel, tp_group)
    return output if bias is None else output + bias


class _WidenedLinear(torch.autograd.Function):
    """y = x Wᵀ, with megatron-core's collectives: gather the sequence, reduce (or reduce-scatter) the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_TBI: Tensor, w_OI: Tensor, reduce: bool, sequence_parallel: bool, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(x_TBI, w_OI)
        ctx.reduce, ctx.sequence_parallel, ctx.group = reduce, sequence_parallel, group
        x = _gather(x_TBI, group) if sequence_parallel else x_TBI
        return (x.float() @ w_OI.float().t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TBI, w_OI = ctx.saved_tensors
        grad = grads[0].float()
        x = _gather(x_TBI, ctx.group) if ctx.sequence_parallel else x_TBI
        dx = (grad @ w_OI.float()).to(x.dtype)
        pending = None
        if ctx.sequence_parallel:
            full, dx = dx, torch.empty_like(x_TBI)
            pending = dist.reduce_scatter_tensor(dx, full.contiguous(), group=ctx.group, async_op=True)
        elif ctx.reduce:
            dx = dx.contiguous()
            pending = dist.all_reduce(dx, group=ctx.group, async_op=True)
        dw = (grad.flatten(0, -2).t() @ x.float().flatten(0, -2)).to(w_OI.dtype) if ctx.needs_input_grad[1] else None
        if pending:
            pending.wait()
        return dx, dw, None, None, None


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    full = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(full, x.contiguous(), group=group)
    return full
