"""Softmax attention on CPUs, a block of queries at a time, so that a block's scores stay in the caches.

torch's fused CPU kernel takes 1.4 (fp32) to 1.8 (bf16) times as long at 512 tokens. This one keeps half of all weights
for backward, so long sequences are the fused kernel's. Shapes: B batch, H heads, N = B·H, Q queries, S keys, K width.
"""

from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.model.softcap import softcap_

_BLOCK = 64  # queries


def blocked_attention(
    q_BHQK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(scale · QKᵀ + mask) V, (B, H, Q, K) in the dtype of its input; scores and softmax are fp32.

    Args:
        q_BHQK: queries.
        k_BHSK: keys.
        v_BHSK: values.
        mask: (1 or B, 1, Q, S), True where a query may see a key, each at least one. None: all not after it. With Q = S
            queries and keys are the same tokens, and whatever the mask none sees a later one.
        scale: factor of the scores.
        softcap: of the scores (softcap.py); backward computes them again.
    """
    return _BlockedAttention.apply(q_BHQK, k_BHSK, v_BHSK, mask, scale, softcap)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        q_NQK, k_NSK, v_NSK = (x.flatten(0, 1) for x in (q, k, v))
        # Scores are multiplied in fp32: rounded to 16 bits, large ones would lose their order.
        queries, keys_NKS = q_NQK.float() * scale, k_NSK.float().transpose(1, 2).contiguous()
        hidden = None if mask is None else ~mask
        above_diagonal = torch.full((_BLOCK, _BLOCK), -torch.inf, device=q.device).triu_(1)
        ctx.blocks, kept = _blocks(q.shape[2], k.shape[2]), []
        out_NQK = torch.empty_like(q_NQK)
        for rows, keys in ctx.blocks:
            scores = queries[:, rows] @ keys_NKS[:, :, keys]
            if softcap:
                softcap_(scores, softcap)
            if hidden is None:
                size = rows.stop - rows.start
                scores[:, :, rows] += above_diagonal[:size, :size]
            else:
                scores.unflatten(0, q.shape[:2]).masked_fill_(hidden[:, :, rows, keys], -torch.inf)
            weights = scores.softmax(-1).to(v.dtype)
            out_NQK[:, rows] = weights @ v_NSK[:, keys]
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(q_NQK, k_NSK, v_NSK, out_NQK, *kept)
        ctx.scale, ctx.softcap, ctx.shape = scale, softcap, q.shape
        return out_NQK.view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NQK, k_NSK, v_NSK, out_NQK, *kept = ctx.saved_tensors
        grad_NQK = grads[0].flatten(0, 1)
        # Σ_s weight · dweight of each query, without the weights.
        inner_NQ1 = (grad_NQK.float() * out_NQK.float()).sum(-1, keepdim=True).to(grad_NQK.dtype)
        values_NKS = v_NSK.transpose(1, 2).contiguous()
        dq, (dk, dv) = torch.empty_like(q_NQK), (torch.zeros_like(x, dtype=torch.float32) for x in (k_NSK, v_NSK))
        for (rows, keys), weights in zip(ctx.blocks, kept, strict=True):
            grad = grad_NQK[:, rows]
            dv[:, keys] += weights.transpose(1, 2) @ grad
            d_scores = (grad @ values_NKS[:, :, keys]).sub_(inner_NQ1[:, rows]).mul_(weights)
            if ctx.softcap:
                scores = q_NQK[:, rows].float() @ k_NSK[:, keys].float().transpose(1, 2)
                d_scores.mul_(1 - scores.mul_(ctx.scale / ctx.softcap).tanh_().square_())
            dq[:, rows] = (d_scores @ k_NSK[:, keys]).mul_(ctx.scale)
            dk[:, keys] += d_scores.transpose(1, 2) @ q_NQK[:, rows]
        dk, dv = (x.to(k_NSK.dtype).unflatten(0, ctx.shape[:2]) for x in (dk.mul_(ctx.scale), dv))
        return dq.view(ctx.shape), dk, dv, None, None, None


def _blocks(queries: int, keys: int) -> list[tuple[slice, slice]]:
    """Rows of queries, each with the keys that any of them may see."""
    rows = [slice(first, min(first + _BLOCK, queries)) for first in range(0, queries, _BLOCK)]
    return [(row, slice(0, row.stop if queries == keys else keys)) for row in rows]
