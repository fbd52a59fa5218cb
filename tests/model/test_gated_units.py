"""Gated units against their definition: outputs and gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vishwamai_mp.model.gated_units import GATED_UNITS

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": nn.GELU(approximate="tanh")}


@pytest.mark.parametrize("name", GATED_UNITS)
def test_a_unit_is_its_activation_of_the_gate_times_up(name):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5, 2, width, generator=generator) for width in (12, 6))
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out = GATED_UNITS[name](None)(ours)
    out.backward(grad)
    gate, up = exact.chunk(2, -1)
    expected = _ACTIVATIONS[name](gate) * up
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
    assert exact.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0, atol=1e-6)
