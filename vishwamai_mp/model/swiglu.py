"""SwiGLU (arXiv 2002.05202) in as few passes over memory as torch's kernels allow.

Shapes: F intermediate width (local).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """silu(gate) · up of a fused projection: (…, 2F) → (…, F).

    megatron-core constructs activations with the `TransformerConfig`, which says nothing that is needed here.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        return _SwiGLU.apply(gate_and_up)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing is kept; megatron-core's MLP asks each of its modules."""
        return {}


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return out
