"""Cross-entropy over vocabulary-parallel logits, blind to the padding of the vocabulary.

Shapes: T tokens, B batch, V vocabulary (local, padded).
"""

from typing import Any

import torch
import torch.distributed as dist
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
        # Per token: log of this shard's sum of exponentials, and the target's logit where it lives here.
        if real:
            log_sum = logits[..., :real].float().logsumexp(dim=-1)
            target = logits.gather(-1, local[..., None])[..., 0].float().masked_fill(outside, 0.0)
        else:
            log_sum = torch.full(targets.shape, -torch.inf, device=logits.device)
            target = torch.zeros(targets.shape, device=logits.device)
        if group.size() > 1:
            highest = log_sum.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
            both = torch.stack(((log_sum - highest).exp(), target))
            dist.all_reduce(both, group=group)
            log_sum, target = highest + both[0].log(), both[1]
        ctx.save_for_backward(logits, log_sum, local, outside)
        ctx.real = real
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_sum, local, outside = ctx.saved_tensors
        grad = grads[0]
        # softmax − onehot(target), times the incoming gradient, in as few passes over the vocabulary as it takes.
        out = logits.float() - log_sum[..., None]
        out.exp_()
        out[..., ctx.real :] = 0.0
        out.mul_(grad[..., None])
        out.scatter_add_(-1, local[..., None], -grad.masked_fill(outside, 0.0)[..., None])
        return out.to(logits.dtype), None, None, None
