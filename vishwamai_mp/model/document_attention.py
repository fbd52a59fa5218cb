"""Packed documents under context parallelism, by Transformer Engine's attention of sequences of any length.

Its own context parallelism would have each document be a multiple of 2 × ranks long. Instead keys and values are
gathered, and each part of a document on this rank attends to the document's keys up to the part's end: a causal mask
that is aligned at the last query and the last key. A window counts back from there too.
Shapes: B rows, Q tokens of a row on this rank, H heads (local), G key-value heads (local), K head width, N = B·Q
queries end to end, S keys of all parts end to end.
"""

import copy
import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup

from vishwamai_mp.model.masks import DocumentBounds, packed_documents


@dataclass
class DocumentParts(PackedSeqParams):
    """What megatron-core passes on to core attention. By the format's name it leaves rows as they are."""

    qkv_format: str = "sbhd"
    bounds: DocumentBounds | None = None


class _Mask(enum.Enum):
    """megatron-core has no name for this mask of Transformer Engine's; its wrapper passes on the name alone."""

    padding_causal_bottom_right = enum.auto()


class DocumentAttention(MegatronModule):
    """Core attention of `DocumentParts`; arguments are those of megatron-core's `TEDotProductAttention`."""

    def __init__(self, *, config: TransformerConfig, pg_collection: Any, **options: Any) -> None:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        super().__init__(config=config)
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        # "cross": queries and keys have lengths of their own, for which its slowest kernel asks.
        options |= {"cp_comm_type": None, "attention_type": "cross"}
        self.kernel = TEDotProductAttention(config=alone, pg_collection=pg_collection, **options)
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query (Q, B, H, K), key and value (Q, B, G, K) → (Q, B, H·K)."""
        assert attention_mask is None
        assert attention_bias is None
        bounds = packed_seq_params.bounds
        attend = partial(
            self.kernel,
            attention_mask=None,
            attn_mask_type=_Mask.padding_causal_bottom_right,
            packed_seq_params=packed_documents(bounds),
        )
        return attend_parts(query, key, value, bounds, self.context_group, attend)


def attend_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: DocumentBounds,
    group: ProcessGroup,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attention of this rank's parts of documents to the keys that each may see.

    Args:
        query: (Q, B, H, K).
        key: (Q, B, G, K), this rank's. Gradients of what was gathered are summed over the group and scattered.
        value: as `key`.
        bounds: of this rank.
        group: the context parallel ranks.
        attend: attention of queries (N, H, K) to keys and values (S, G, K) within `bounds`, (N, H·K).

    Returns:
        (Q, B, H·K).
    """
    queries, rows = query.shape[:2]
    key, value = (
        tensor_parallel.gather_from_sequence_parallel_region(x.contiguous(), group=group)
        .flatten(0, 1)
        .index_select(0, bounds.keys)
        for x in (key, value)
    )
    out = attend(query.transpose(0, 1).flatten(0, 1), key, value)
    return out.view(rows, queries, -1).transpose(0, 1).contiguous()
