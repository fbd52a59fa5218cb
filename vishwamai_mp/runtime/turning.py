"""Rotary position embeddings on CPUs, in three passes forward and backward.

megatron-core's function makes a copy with halves exchanged, two products, a sum and a copy of the whole, and autograd
twice as many. Here products are added in place, rounded once.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def turning_in_place(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """megatron-core's `_apply_rotary_pos_emb_bshd`, by `turned` for what is on a CPU and turned by halves."""

    @functools.wraps(original)
    def call(t: Tensor, freqs: Tensor, *args: Any, mscale: float = 1.0, **options: Any) -> Tensor:
        switched = any(args) or any(options.values())  # pairs interleaved, or latent attention
        if switched or t.device.type != "cpu":
            return original(t, freqs, *args, mscale=mscale, **options)
        return turned(t, (freqs.cos() * mscale).to(t.dtype), (freqs.sin() * mscale).to(t.dtype))

    return call


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The first R numbers of each head turned: number i with number i + R/2.

    Args:
        x: (T, B, H, K).
        cosine, sine: (T, 1 or B, 1, R), of the angle of each number. Without a gradient.
    """
    return _Turned.apply(x, cosine, sine)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(x, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return _turn(grads[0], cosine, sine.roll(sine.shape[-1] // 2, -1), -1), None, None  # a number's partner's sine


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor:
    width = cosine.shape[-1]
    first, second = slice(0, width // 2), slice(width // 2, width)
    out = x.new_empty(x.shape)
    torch.mul(x[..., :width], cosine, out=out[..., :width])
    out[..., first].addcmul_(x[..., second], sine[..., first], value=-direction)
    out[..., second].addcmul_(x[..., first], sine[..., second], value=direction)
    out[..., width:] = x[..., width:]
    return out
