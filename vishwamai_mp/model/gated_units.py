"""Gated linear units (arXiv 2002.05202) in as few passes over memory as torch's kernels allow.

Shapes: F intermediate width (local).
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedUnit(nn.Module, ABC):
    """activated(gate) · up of a fused projection: (…, 2F) → (…, F).

    megatron-core constructs activations with the `TransformerConfig`, which says nothing that is needed here.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def activated(gate: Tensor) -> Tensor:
        """The activation, as a new tensor."""

    @staticmethod
    @abstractmethod
    def differentiate(grad: Tensor, gate: Tensor, out: Tensor) -> None:
        """Write the gradient of `gate` to `out`, from that of `activated(gate)`."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        return _Gated.apply(gate_and_up, type(self))

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing is kept; megatron-core's MLP asks each of its modules."""
        return {}


class SwiGLU(GatedUnit):
    """With SiLU."""

    @staticmethod
    def activated(gate: Tensor) -> Tensor:
        return F.silu(gate)

    @staticmethod
    def differentiate(grad: Tensor, gate: Tensor, out: Tensor) -> None:
        torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=out)


class GeGLU(GatedUnit):
    """With GELU, approximated by tanh (arXiv 1606.08415)."""

    @staticmethod
    def activated(gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")

    @staticmethod
    def differentiate(grad: Tensor, gate: Tensor, out: Tensor) -> None:
        torch.ops.aten.gelu_backward.grad_input(grad, gate, approximate="tanh", grad_input=out)


GATED_UNITS: dict[str, type[GatedUnit]] = {"swiglu": SwiGLU, "geglu": GeGLU}  # by `model.activation`


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: type[GatedUnit]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.unit = unit
        gate, up = x.chunk(2, dim=-1)
        return unit.activated(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(ctx.unit.activated(gate), grad, out=d_up)
        ctx.unit.differentiate(grad * up, gate, d_gate)
        return out, None
