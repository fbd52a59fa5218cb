"""Causal attention in bf16 on CPUs: torch's fused kernel forward, and backward by products of bf16 matrices.

That kernel's own backward takes five times as long as its forward where such products have hardware.

Backward makes the weights P = exp(scale · q·k − log Σexp) again, a block of keys at a time. A product of bf16 matrices
is rounded to bf16, in which a score of 50 may be off by an eighth, and its weight by as much. So what is subtracted is
subtracted within the product: three more columns hold it in three pieces of eight bits, opposite ones. The result is
log P, rounded by |log P| / 512, and P by at most 0.37 / 512: less than by what bf16 does to P itself. In the same way
the gradient of the weights comes less its mean.

Shapes: B batch, H heads, N = B·H, T tokens, K width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 128  # keys
_PIECES = 3


def rebuilt_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `blocked_attention`; with a mask, or with other keys than the queries' own, torch's kernel does all."""
    if mask is not None or q_BHTK.shape != k_BHTK.shape:
        return F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    return _RebuiltAttention.apply(q_BHTK, k_BHTK, v_BHTK, scale)


class _RebuiltAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sums = kernel(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, grad = (x.flatten(0, 1) for x in (*ctx.saved_tensors[:4], grads[0]))
        log_sums = ctx.saved_tensors[4].reshape(q.shape[:2])
        means = (grad.float() * out.float()).sum(-1)  # Σ_s weight · its gradient, of each query
        queries, keys = _less(q, log_sums / ctx.scale), _beside_ones(k)
        outer, values = _less(grad, means), _beside_ones(v)
        dq, dk, dv = torch.zeros_like(q, dtype=torch.float32), torch.empty_like(k), torch.empty_like(v)
        for first in range(0, q.shape[1], _BLOCK):
            block, seeing = slice(first, first + _BLOCK), slice(first, None)  # keys, and the queries that see them
            weights = (queries[:, seeing] @ keys[:, block].transpose(1, 2)).mul_(ctx.scale).exp_()
            weights[:, :_BLOCK].tril_()
            dv[:, block] = weights.transpose(1, 2) @ grad[:, seeing]
            d_scores = (outer[:, seeing] @ values[:, block].transpose(1, 2)).mul_(weights)
            dk[:, block] = (d_scores.transpose(1, 2) @ q[:, seeing]).mul_(ctx.scale)
            dq[:, seeing] += d_scores @ k[:, block]
        shape = ctx.saved_tensors[0].shape
        return dq.mul_(ctx.scale).to(q.dtype).view(shape), dk.view(shape), dv.view(shape), None


def _less(rows_NTK: Tensor, numbers_NT: Tensor) -> Tensor:
    """Rows whose products with those of `_beside_ones` are less by these numbers, (N, T, K + pieces)."""
    pieces, left = [], -numbers_NT.float()
    for _ in range(_PIECES):
        pieces.append(left.to(rows_NTK.dtype))
        left = left - pieces[-1].float()
    return torch.cat((rows_NTK, torch.stack(pieces, -1)), -1)


def _beside_ones(rows_NTK: Tensor) -> Tensor:
    return torch.cat((rows_NTK, rows_NTK.new_ones(*rows_NTK.shape[:2], _PIECES)), -1)
