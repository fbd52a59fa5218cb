"""Gated linear units (arXiv 2002.05202) in as few passes over memory as torch's kernels allow.

Shapes: F intermediate width (local).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vishwamai_mp.runtime.fusion import fuses, fusible


class GatedUnit(nn.Module, ABC):
    """activated(gate) · up of a fused projection: (…, 2F) → (…, F).

    megatron-core constructs activations with the `TransformerConfig`, which says nothing that is needed here.

    Attributes:
        derivative: torch's operator for the gradient of the activation's input.
        options: of that operator.
    """

    derivative: Any
    options: Mapping[str, str] = {}

    def __init__(self, config: Any) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def activated(gate: Tensor) -> Tensor:
        """The activation, as a new tensor."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        return _Gated.apply(gate_and_up, type(self))

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing is kept; megatron-core's MLP asks each of its modules."""
        return {}


class SwiGLU(GatedUnit):
    """With SiLU."""

    derivative = torch.ops.aten.silu_backward

    @staticmethod
    def activated(gate: Tensor) -> Tensor:
        return F.silu(gate)


class GeGLU(GatedUnit):
    """With GELU, approximated by tanh (arXiv 1606.08415)."""

    derivative, options = torch.ops.aten.gelu_backward, {"approximate": "tanh"}

    @staticmethod
    def activated(gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")


GATED_UNITS: dict[str, type[GatedUnit]] = {"swiglu": SwiGLU, "geglu": GeGLU}  # by `model.activation`


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: type[GatedUnit]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.unit = unit
        return _gated(x, unit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        unit = ctx.unit
        if fuses():
            return _differentiated(x, grad, unit), None
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(unit.activated(gate), grad, out=d_up)
        unit.derivative.grad_input(grad * up, gate, grad_input=d_gate, **unit.options)
        return out, None


@fusible
def _gated(x: Tensor, unit: type[GatedUnit]) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return unit.activated(gate).mul_(up)


@fusible
def _differentiated(x: Tensor, grad: Tensor, unit: type[GatedUnit]) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    d_gate = unit.derivative.default(grad * up, gate, **unit.options)
    return torch.cat((d_gate, unit.activated(gate) * grad), -1)
