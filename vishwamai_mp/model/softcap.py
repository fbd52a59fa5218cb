"""Soft caps (arXiv 2408.00118): numbers that cannot leave (−cap, cap), and hardly change far within."""

from typing import Any

import torch
from torch import Tensor


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap), which alone is kept for backward: what follows keeps it anyway."""
    return _SoftCap.apply(x, cap)


def softcap_(x: Tensor, cap: float) -> Tensor:
    """The same in place, without a gradient."""
    return x.div_(cap).tanh_().mul_(cap)


class _SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float) -> Tensor:
        out = (x / cap).tanh_().mul_(cap)
        ctx.save_for_backward(out)
        ctx.cap = cap
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return (out / ctx.cap).square_().neg_().add_(1).mul_(grads[0]), None
