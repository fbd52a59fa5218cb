"""How context parallelism deals out a sequence."""

import torch
from torch import Tensor


def local_positions(length: int, rank: int, size: int, device: torch.device | None = None) -> Tensor:
    """Positions in the sequence of the tokens on one context parallel rank, (length / size,).

    megatron-core's zigzag: of 2·size chunks, rank r holds r and 2·size−1−r, so that causal work is even.
    """
    if size == 1:
        return torch.arange(length, device=device)
    chunks = torch.arange(length, device=device).view(2 * size, -1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))
