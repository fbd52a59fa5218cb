"""Which token may attend to which: a boolean mask, or for Transformer Engine the bounds of packed documents.

Transformer Engine's attention takes the documents' lengths and reads no boolean mask. There the rows of a micro-batch
are laid end to end, one sequence of documents ("thd" in Transformer Engine's words).
Shapes: B rows, T tokens of a whole row, Q queries (this rank's tokens of a row), S keys, N documents of the
micro-batch, under context parallelism the parts of documents that are this rank's.
"""

from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from vishwamai_mp.runtime.host_copies import sent
from vishwamai_mp.runtime.zigzag import local_positions


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


class DocumentBounds(NamedTuple):
    """Where documents start and end when rows are laid end to end; a row's end also ends a document.

    Attributes:
        places: (N + 1,) int32, the first token of each document and the end.
        longest: tokens of the longest document: a number, which the kernels ask for.
        key_places: the same of the keys that each is given: on one context parallel rank of several, a part of a
            document is given the document's keys from its beginning to the part's end. None: the keys are its own.
        longest_keys: keys of the longest.
        keys: (S,) int32, where those keys, one part's after the other's, lie among all ranks' keys as they are gathered
            (ranks, Q, B). None without `key_places`.
    """

    places: Tensor
    longest: int
    key_places: Tensor | None = None
    longest_keys: int = 0
    keys: Tensor | None = None

    def to(self, device: torch.device) -> "DocumentBounds":
        """On the device, without waiting for it."""
        key_places, keys = (part if part is None else sent(part, device) for part in (self.key_places, self.keys))
        return DocumentBounds(sent(self.places, device), self.longest, key_places, self.longest_keys, keys)


def document_bounds(document_ids_BT: Tensor, rank: int = 0, ranks: int = 1) -> DocumentBounds:
    """Bounds from document ids, of which neighbours in a row are of one document where theirs are equal.

    The host reads how many documents there are: on a GPU it waits, so that the data loader asks for tensors of its own.

    Args:
        document_ids_BT: of whole rows.
        rank: in context parallelism.
        ranks: that share a row.
    """
    starts = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    if ranks > 1:
        return _bounds_of_rank(starts, rank, ranks)
    bounds = _places(starts)
    return DocumentBounds(bounds, int(bounds.diff().max()))


def _bounds_of_rank(starts_BT: Tensor, rank: int, ranks: int) -> DocumentBounds:
    """`document_bounds` of parts of documents, which also end where the rank's share of a row has a gap."""
    (rows, length), device = starts_BT.shape, starts_BT.device
    shares = [local_positions(length, other, ranks, device) for other in range(ranks)]
    own_Q = shares[rank]
    begins_BQ = starts_BT[:, own_Q]
    begins_BQ[:, 0] = True
    begins_BQ[:, 1:] |= own_Q.diff() != 1
    places = _places(begins_BQ)
    first, last = places[:-1].long(), places[1:].long() - 1
    document_starts_BT = torch.where(starts_BT, torch.arange(length, device=device), 0).cummax(1).values
    start = document_starts_BT[:, own_Q].flatten()[first]  # of a part's document, in its row
    sizes = own_Q[last % len(own_Q)] + 1 - start
    key_places = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    part = torch.repeat_interleave(sizes)  # of each key
    place = torch.arange(len(part), device=device) - (key_places[:-1] - start)[part]  # in its row
    gathered_T = torch.cat(shares).argsort()
    keys = gathered_T[place] * rows + (first // len(own_Q))[part]
    return DocumentBounds(places, int(places.diff().max()), key_places.int(), int(sizes.max()), keys.int())


def _places(begins: Tensor) -> Tensor:
    """Where something begins, rows laid end to end, and the end: int32."""
    return torch.nn.functional.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=begins.numel()).int()


def packed_documents(bounds: DocumentBounds) -> PackedSeqParams:
    """megatron-core's parameters for attention within the documents."""
    keys = bounds.places if bounds.key_places is None else bounds.key_places
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds.places,
        cu_seqlens_kv=keys,
        max_seqlen_q=bounds.longest,
        max_seqlen_kv=bounds.longest_keys or bounds.longest,
    )
