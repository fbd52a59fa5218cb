"""Packed documents by Transformer Engine's attention of sequences of any length, laid end to end.

Its own context parallelism would have each document be a multiple of 2 × ranks long. Instead keys and values are
gathered, and each part of a document on this rank attends to the document's keys up to the part's end: a causal mask
that is aligned at the last query and the last key. A window counts back from there too.
Shapes: B rows, Q tokens of a row on this rank, H heads (local), G key-value heads (local), K head width, N = B·Q
queries end to end, S keys of all parts end to end.
"""

import copy
import enum
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from vishwamai_mp.model.masks import DocumentBounds, packed_documents


@dataclass
class PackedDocuments(PackedSeqParams):
    """What megatron-core passes on to core attention. By the format's name it leaves rows as they are: queries and keys
    are turned by their place in the row, without anybody reading documents' lengths, and components know of rows.
    """

    qkv_format: str = "sbhd"
    bounds: DocumentBounds | None = None


class _Mask(enum.Enum):
    """megatron-core has no name for this mask of Transformer Engine's; its wrapper passes on the name alone."""

    padding_causal_bottom_right = enum.auto()


class DocumentAttention(MegatronModule):
    """Core attention of `PackedDocuments`; arguments are those of megatron-core's `TEDotProductAttention`."""

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
        if packed_seq_params is None:  # rows that nobody divided
            assert self.context_group.size() == 1
            return self.kernel(query, key, value, None, attn_mask_type=attn_mask_type)
        bounds = packed_seq_params.bounds
        attend = partial(
            self.kernel,
            attention_mask=None,
            attn_mask_type=attn_mask_type if bounds.keys is None else _Mask.padding_causal_bottom_right,
            packed_seq_params=packed_documents(bounds),
        )
        queries, rows = query.shape[:2]
        keys, values = (self._keys(x, bounds.keys) for x in (key, value))
        out = attend(query.transpose(0, 1).flatten(0, 1), keys, values)
        return out.view(rows, queries, -1).transpose(0, 1).contiguous()

    def _keys(self, x: Tensor, chosen: Tensor | None) -> Tensor:
        """Of this rank's keys or values (Q, B, G, K) all, row by row, or of all ranks' those `chosen`: (S, G, K).

        Gradients of what was gathered are summed over the ranks and scattered.
        """
        if chosen is None:
            return x.transpose(0, 1).flatten(0, 1)
        gathered = tensor_parallel.gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group)
        return gathered.flatten(0, 1).index_select(0, chosen)
