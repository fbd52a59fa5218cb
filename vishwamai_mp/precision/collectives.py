"""What tensor parallel linear layers exchange around their products, as megatron-core's own do."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole sequence from all ranks' parts of it (dimension 0)."""
    full = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(full, x.contiguous(), group=group)
    return full


def reduce_input_gradient(
    dx: Tensor, shape: torch.Size, reduce: bool, sequence_parallel: bool, group: dist.ProcessGroup
) -> tuple[Tensor, Any]:
    """Start summing the gradient of a column parallel layer's input over the ranks.

    Args:
        dx: this rank's summand, of the whole sequence.
        shape: of the input on this rank.
        reduce: sum it.
        sequence_parallel: sum it, and leave each rank its part of the sequence.
        group: tensor parallel ranks.

    Returns:
        where the sum will be, and what to wait for (None: nothing).
    """
    if sequence_parallel:
        full, dx = dx, dx.new_empty(shape)
        return dx, dist.reduce_scatter_tensor(dx, full.contiguous(), group=group, async_op=True)
    if reduce:
        dx = dx.contiguous()
        return dx, dist.all_reduce(dx, group=group, async_op=True)
    return dx, None
