"""Which token may attend to which.

Shapes: B batch, T tokens of the whole sequence, Q queries (this rank's tokens), S keys.
"""

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


def attention_mask(
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """True where a query may attend to a key: not after it, within the window, in the same document.

    Args:
        query_positions: (Q,) places in the sequence.
        key_positions: (S,).
        window: a token sees this many tokens up to and including itself.
        document_ids: (B, T) integers, by place in the sequence.

    Returns:
        (1 or B, 1, Q, S) bool.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if document_ids is None:
        return allowed[None, None]
    same = document_ids[:, query_positions, None] == document_ids[:, None, key_positions]
    return (allowed & same)[:, None]
