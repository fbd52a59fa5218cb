"""Context parallelism: tokens of all ranks for some heads, instead of some tokens for all heads.

The memory is sequential in tokens and independent in heads, so the context parallel ranks exchange one for the other
(as DeepSpeed-Ulysses does for attention, arXiv 2309.14509), and megatron-core's zigzag order is undone on the way.

Shapes: Q tokens of this rank, T of the whole row, B rows, H heads (of this tensor parallel rank), R ranks, W width.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from vishwamai_mp.runtime.zigzag import local_positions


def gather_tokens(x: Tensor, group: Any) -> Tensor:
    """(Q, B, H, W) → (T, B, H/R, W), tokens in the row's order, heads of this rank."""
    ranks = group.size()
    if ranks == 1:
        return x
    sent = x.unflatten(2, (ranks, -1)).movedim(2, 0).flatten(0, 1).contiguous()
    return all_to_all(group, sent)[_order(len(sent), ranks, x.device).argsort()]


def scatter_tokens(x: Tensor, group: Any) -> Tensor:
    """The inverse: (T, B, H/R, W) → (Q, B, H, W)."""
    ranks = group.size()
    if ranks == 1:
        return x
    received = all_to_all(group, x[_order(len(x), ranks, x.device)].contiguous())
    return received.unflatten(0, (ranks, -1)).movedim(0, 2).flatten(2, 3)


def _order(tokens: int, ranks: int, device: torch.device) -> Tensor:
    """Places in the row of the tokens of rank 0, then of rank 1, and so on."""
    return torch.cat([local_positions(tokens, rank, ranks, device) for rank in range(ranks)])
