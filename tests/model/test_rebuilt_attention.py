"""Attention whose backward makes the weights again, in bf16, against float64; with scores that bf16 cannot hold too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vishwamai_mp.model import rebuilt_attention as module
from vishwamai_mp.model.rebuilt_attention import rebuilt_attention


def drawn(tokens: int, largest: float = 1.0) -> list[Tensor]:
    """Queries, keys and values laid out as they come from the projection, and the gradient of the result."""
    random = torch.Generator().manual_seed(1)
    tensors = (torch.randn(tokens, 2, 3, 32, generator=random).permute(1, 2, 0, 3) for _ in range(4))
    return [(size * x).bfloat16() for size, x in zip((largest, largest, 1, 1), tensors, strict=True)]


def gradients(inputs: list[Tensor], ours: bool, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, grad = (x.detach().to(dtype).requires_grad_() for x in inputs)
    out = (
        rebuilt_attention(q, k, v, None, 0.2)
        if ours
        else F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
    )
    return [out, *torch.autograd.grad(out, (q, k, v), grad.detach())]


@pytest.mark.parametrize(("tokens", "largest"), [(130, 1.0), (64, 1.0), (5, 1.0), (130, 6.0)])
def test_results_and_gradients(tokens, largest):
    inputs = drawn(tokens, largest)
    for ours, exact in zip(
        gradients(inputs, True, torch.bfloat16), gradients(inputs, False, torch.float64), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert float(((ours.double() - exact).norm() / exact.norm()).detach()) < 0.01


def test_scores_rounded_by_themselves_would_not_do(monkeypatch):
    """What the last case shows: with one piece, weights are off by what bf16 does to scores of 50."""
    inputs = drawn(130, 6.0)
    monkeypatch.setattr(module, "_PIECES", 1)
    ours, exact = gradients(inputs, True, torch.bfloat16)[1], gradients(inputs, False, torch.float64)[1]
    assert float((ours.double() - exact).norm() / exact.norm()) > 0.02


def test_masks_are_the_kernels():
    q, k, v, _ = drawn(20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    mask[..., 9:, :4] = False
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.2)
    assert torch.equal(rebuilt_attention(q, k, v, mask, 0.2), expected)
