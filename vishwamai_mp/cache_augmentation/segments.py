"""Where segments lie: a segment is `length` tokens of one document, counted from the document's start.

So a document in a packed row has the segments that it has alone. All shapes follow from the row's length: N = T //
`length` places for segments, of which short documents leave some empty.

Shapes: B rows (1 where rows are alike), T tokens of the whole row, N segments of a row, C tokens of a contiguous chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The completed segments of each row, in order.

    Attributes:
        length: tokens of a segment.
        last: (B, N) position of each one's last token; T where there is none. Later tokens may read it.
        until: (B, N) end of its document: tokens from there on may not; 0 where there is none.
        within: (B, T) each token's place in its document; None: rows are one document.
    """

    length: int
    last: Tensor
    until: Tensor
    within: Tensor | None


def locate(length: int, tokens: int, documents: Tensor | None, device: torch.device) -> Segments:
    """Find the segments of rows of `tokens` tokens.

    Args:
        length: tokens of a segment.
        tokens: T.
        documents: (B, T) integers, constant inside a document and different between neighbours; None: one per row.
        device: of the results.
    """
    count = tokens // length
    if documents is None:
        last = torch.arange(length - 1, count * length, length, device=device)[None]
        return Segments(length, last, torch.full_like(last, tokens), None)
    rows = documents.shape[0]
    position = torch.arange(tokens, device=device).expand(rows, tokens)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    within = position - torch.where(starts, position, 0).cummax(1).values
    # A document ends where the next one starts: the nearest start after a token is a running minimum from the right.
    next_start = torch.where(starts, position, tokens).roll(-1, 1)
    next_start[:, -1] = tokens
    ends = next_start.flip(1).cummin(1).values.flip(1)
    closes = within % length == length - 1
    slot = torch.where(closes, closes.cumsum(1) - 1, count)  # what closes nothing goes to a place that is cut off
    last = position.new_full((rows, count + 1), tokens).scatter(1, slot, position)[:, :count]
    last[:, :count] = torch.where(torch.arange(count, device=device) < closes.sum(1, keepdim=True), last, tokens)
    until = torch.where(last < tokens, ends.gather(1, last.clamp(max=tokens - 1)), 0)
    return Segments(length, last, until, within)
