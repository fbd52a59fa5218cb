"""Which token may attend to which. Shapes: B batch, T tokens of the whole sequence, Q this rank's tokens."""

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
    length: int,
    *,
    document_ids: Tensor | None = None,
    window: int | None = None,
    context_rank: int = 0,
    context_size: int = 1,
    device: torch.device | None = None,
) -> Tensor | None:
    """True where a query may attend to a key.

    Args:
        length: T.
        document_ids: (B, T) integers; tokens of different documents do not see each other.
        window: a token sees this many tokens up to and including itself.
        context_rank, context_size: queries are this rank's; keys are all ranks', in rank order.

    Returns:
        (1 or B, 1, Q, T) bool, or None where plain causal order says it all.
    """
    if document_ids is None and window is None and context_size == 1:
        return None
    queries = local_positions(length, context_rank, context_size, device)
    keys = torch.cat([local_positions(length, rank, context_size, device) for rank in range(context_size)])
    distance = queries[:, None] - keys[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if document_ids is None:
        return allowed[None, None]
    same = document_ids[:, queries, None] == document_ids[:, None, keys]
    return (allowed & same)[:, None]
