"""Cross-entropy over vocabulary-parallel logits, blind to the padding of the vocabulary.

Shapes: T tokens, B batch, V vocabulary (local, padded).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def vocab_parallel_cross_entropy(
    logits_TBV: Tensor, targets_TB: Tensor, vocab_size: int, group: dist.ProcessGroup
) -> Tensor:
    """−log softmax(logits)[target] without gathering the logits.

    Args:
        logits_TBV: this rank's shard; rank r holds ids [r·V, (r+1)·V). Ids from `vocab_size` on are padding and take
            no part in the softmax, so the loss is the same at every tensor parallel size.
        targets_TB: global token ids.
        vocab_size: real tokens.
        group: the tensor parallel group.

    Returns:
        fp32 losses, (T, B), equal on all ranks of the group. Communicates two numbers per token.
    """
    return _CrossEntropy.apply(logits_TBV, targets_TB, vocab_size, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
        first = group.rank() * logits.shape[-1]
        real = max(0, min(logits.shape[-1], vocab_size - first))
        local = targets - first
        outside = (local < 0) | (local >= real)
        local = local.masked_fill(outside, 0)
        # torch's kernel makes the fewest passes over the vocabulary; a shard's own normaliser is corrected below.
        log_probs = F.log_softmax(logits[..., :real], dim=-1, dtype=torch.float32)
        if group.size() > 1:
            log_probs += _shard_log_sum(logits, log_probs, group)[..., None]
        losses = torch.zeros(targets.shape, device=logits.device)
        if real:
            losses -= log_probs.gather(-1, local[..., None])[..., 0].masked_fill(outside, 0.0)
        if group.size() > 1:
            dist.all_reduce(losses, group=group)
        ctx.save_for_backward(log_probs, local, outside)
        ctx.like = logits.shape, logits.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_probs, local, outside = ctx.saved_tensors
        shape, dtype = ctx.like
        # softmax − onehot(target), times the incoming gradient; padding has none.
        probs = log_probs.exp()
        probs.mul_(grads[0][..., None])
        if probs.shape[-1]:
            probs.scatter_add_(-1, local[..., None], -grads[0].masked_fill(outside, 0.0)[..., None])
        out = probs.to(dtype)
        if out.shape != shape:
            out = F.pad(out, (0, shape[-1] - out.shape[-1]))
        return out, None, None, None


def _shard_log_sum(logits: Tensor, log_probs: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log of (this shard's sum of exponentials / that of all shards), per token."""
    if log_probs.shape[-1]:
        # log Σexp = logit − log_prob at any id; at the largest, nothing is lost to cancellation.
        own = logits[..., : log_probs.shape[-1]].amax(-1).float() - log_probs.amax(-1)
    else:
        own = torch.full(logits.shape[:-1], -torch.inf, device=logits.device)
    highest = own.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    total = (own - highest).exp()
    dist.all_reduce(total, group=group)
    return own - highest - total.log()
