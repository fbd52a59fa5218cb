"""Which token may attend to which.

Shapes: B batch, T tokens of the whole sequence, Q queries (this rank's tokens), S keys.
"""

from torch import Tensor


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
