"""Which token may attend to which: a boolean mask, or for Transformer Engine the bounds of packed documents.

Transformer Engine's attention takes the documents' lengths and reads no boolean mask. There the rows of a micro-batch
are laid end to end, one sequence of documents ("thd" in Transformer Engine's words).
Shapes: B rows, T tokens of a whole row, Q queries (this rank's tokens), S keys, N documents of the micro-batch.
"""

from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from vishwamai_mp.config import ConfigError, PretrainConfig


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


def check_packing(config: PretrainConfig) -> None:
    """Refuse what Transformer Engine's packed attention cannot do.

    Raises:
        ConfigError: packed documents under context parallelism; rows that are to go on in the next micro-batch.
    """
    context = config.parallel.context_parallel_size
    if config.data.reset_attention_mask and context > 1:
        raise ConfigError(
            f"data.reset_attention_mask=true with parallel.context_parallel_size={context}: on Transformer Engine a"
            " document would have to be a multiple of 2 × context_parallel_size long; use context_parallel_size=1"
            " or data.reset_attention_mask=false"
        )
    for section in ("memory", "cache"):
        options = getattr(config, section)
        if options.enabled and options.carry_state:
            raise ConfigError(
                f"{section}.carry_state=true on Transformer Engine: packed attention lays the rows of a micro-batch end"
                f" to end, so none goes on in its place; set {section}.carry_state=false"
            )


class DocumentBounds(NamedTuple):
    """Where documents start and end when rows are laid end to end; a row's end also ends a document.

    Attributes:
        places: (N + 1,) int32, the first token of each document and the end.
        longest: tokens of the longest document: a number, which the kernels ask for.
    """

    places: Tensor
    longest: int


def document_bounds(document_ids_BT: Tensor) -> DocumentBounds:
    """Bounds from document ids, of which neighbours in a row are of one document where theirs are equal.

    The host reads how many documents there are: on a GPU it waits, so that the data loader asks for tensors of its own.
    """
    starts = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    bounds = torch.nn.functional.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel()).int()
    return DocumentBounds(bounds, int(bounds.diff().max()))


def packed_documents(bounds: DocumentBounds) -> PackedSeqParams:
    """megatron-core's parameters for attention within the documents."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds.places,
        cu_seqlens_kv=bounds.places,
        max_seqlen_q=bounds.longest,
        max_seqlen_kv=bounds.longest,
    )
