"""Cross-entropy over vocabulary-parallel logits, blind to the padding of the vocabulary.

Shapes: T tokens, B batch, V vocabulary (local, padded).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.runtime.device import row_blocks
from vishwamai_mp.runtime.fusion import fuses, fusible


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
        fp32 losses, (T, B), equal on all ranks of the group. Communicates three numbers per token.
    """
    return _CrossEntropy.apply(logits_TBV, targets_TB, vocab_size, group)


class _CrossEntropy(torch.autograd.Function):
    """By blocks of tokens, whose fp32 copies stay in the caches; backward needs the logits, and one number each."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
        first = group.rank() * logits.shape[-1]
        real = max(0, min(logits.shape[-1], vocab_size - first))
        local = (targets - first).flatten()
        outside = (local < 0) | (local >= real)
        local = local.masked_fill(outside, 0)
        rows = logits.flatten(0, 1)[:, :real]
        log_sums = torch.full(local.shape, -torch.inf, device=logits.device)
        own = torch.zeros(local.shape, device=logits.device)
        if real:
            if fuses():
                log_sums = _log_sums(rows)
            else:
                for block in row_blocks(rows):
                    log_sums[block] = _log_sums(rows[block])
            own = rows.gather(-1, local[:, None])[:, 0].float().masked_fill(outside, 0.0)
        if group.size() > 1:
            log_sums = _all_log_sums(log_sums, group)
            dist.all_reduce(own, group=group)
        ctx.save_for_backward(logits, log_sums, local, outside)
        ctx.real = real
        return (log_sums - own).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_sums, local, outside = ctx.saved_tensors
        rows, grad = logits.flatten(0, 1)[:, : ctx.real], grads[0].flatten()
        # softmax − onehot(target), times the incoming gradient; padding has none.
        onehot = grad.masked_fill(outside, 0.0)
        if fuses():
            out = _differentiated(logits.flatten(0, 1), log_sums, grad, local, onehot, ctx.real)
            return out.view(logits.shape), None, None, None
        # Contiguous, whatever the logits are: its rows are written through a view.
        make = torch.zeros_like if ctx.real < logits.shape[-1] else torch.empty_like
        out = make(logits, memory_format=torch.contiguous_format)
        for block in row_blocks(rows) if ctx.real else ():
            probs = (rows[block] - log_sums[block, None]).exp_().mul_(grad[block, None])
            probs.scatter_add_(-1, local[block, None], -onehot[block, None])
            out.flatten(0, 1)[block, : ctx.real] = probs
            del probs  # before the next block is made
        return out, None, None, None


@fusible
def _log_sums(rows_NV: Tensor) -> Tensor:
    """log Σexp of each row, in fp32."""
    return rows_NV.float().logsumexp(-1)


@fusible
def _differentiated(
    logits_NV: Tensor, log_sums: Tensor, grad: Tensor, local: Tensor, onehot: Tensor, real: int
) -> Tensor:
    """The gradient of the logits in one pass, which a comparison with each id costs nothing."""
    ids = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    probs = (logits_NV.float() - log_sums[:, None]).exp() * grad[:, None]
    out = probs - torch.where(ids == local[:, None], onehot[:, None], 0.0)
    return torch.where(ids < real, out, 0.0).to(logits_NV.dtype)


def _all_log_sums(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log Σexp over all shards from each shard's own."""
    highest = own.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    total = (own - highest).exp()
    dist.all_reduce(total, group=group)
    return highest + total.log()
