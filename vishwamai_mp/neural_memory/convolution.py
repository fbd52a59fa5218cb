"""Short causal convolution of each channel, within documents.

Shapes: T tokens, B batch, F channels, J taps.
"""

from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.runtime.device import at_once

_SLAB = 64  # tokens that stay in a CPU's cache while all taps pass over them


def causal_convolution(x: Tensor, weight: Tensor, before: Tensor | None, documents: Tensor | None) -> Tensor:
    """y_t = Σ_j weight_j x_{t−J+1+j}, over tokens of the same document.

    Args:
        x: (T, B, F).
        weight: (J, F); the last tap is of the token itself.
        before: (J − 1, B, F) the tokens before; None: there are none.
        documents: (J − 1 + T, B) integers, different in different documents; None: all is one.

    Returns:
        (T, B, F).
    """
    taps = weight.shape[0]
    if before is None:
        before = x.new_zeros(taps - 1, *x.shape[1:])
    return _Convolution.apply(torch.cat((before, x)), weight, documents)


def _slabs(x: Tensor) -> list[slice]:
    """Slices of tokens that all taps pass over before the next."""
    length, width = len(x), x[0].numel()
    size = max(1, at_once(x, _SLAB * width) // width)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _masked(x: Tensor, documents: Tensor | None, span: slice, delay: int, taps: int) -> Tensor:
    """`x`, of the tokens in `span`, where the token `delay` earlier is of the same document; else 0."""
    if documents is None or delay == 0:
        return x
    own = documents[span.start + taps - 1 : span.stop + taps - 1]
    earlier = documents[span.start + taps - 1 - delay : span.stop + taps - 1 - delay]
    return x * (own == earlier)[..., None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, documents: Tensor | None) -> Tensor:
        taps = len(weight)
        out = torch.empty_like(padded[taps - 1 :])
        for span in _slabs(out):
            torch.mul(padded[span.start + taps - 1 : span.stop + taps - 1], weight[-1], out=out[span])
            for delay in range(1, taps):
                tap = taps - 1 - delay
                earlier = _masked(padded[span.start + tap : span.stop + tap], documents, span, delay, taps)
                out[span].addcmul_(earlier, weight[tap])
        ctx.save_for_backward(padded, weight, documents)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        padded, weight, documents = ctx.saved_tensors
        taps = len(weight)
        d_padded = torch.zeros_like(padded)
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for span in _slabs(grads[0]):
            grad = grads[0][span]
            for tap in range(taps):
                masked = _masked(grad, documents, span, taps - 1 - tap, taps)
                window = slice(span.start + tap, span.stop + tap)
                d_padded[window].addcmul_(masked, weight[tap])
                d_weight[tap] += (masked * padded[window]).sum((0, 1), dtype=d_weight.dtype)
        return d_padded, d_weight.to(weight.dtype), None
