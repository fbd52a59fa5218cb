"""`model.attention=examples.extensions.cosine_attention:CosineAttention`: queries and keys of length one.

Query-key normalisation (arXiv 2010.04245): what is compared is directions alone, times a learnt scale for each head, so
that scores cannot grow without bound. Around keys and values a subclass may do what it likes: generation runs its
modules too, and a parameter that says how it is split is saved and loaded at any layout.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from vishwamai_mp.model.key_values import KvSelfAttention


class CosineAttention(KvSelfAttention):
    """Scores are scale · cos(query, key); shapes: T tokens, B batch, H query heads, G key heads (local), K width."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        heads, width = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        # Core attention divides by √K; so a scale begins at √K, where plain attention's random scores are.
        like = self.linear_proj.weight
        self.scale = nn.Parameter(torch.full((heads,), float(width), dtype=like.dtype, device=like.device))
        set_tensor_model_parallel_attributes(self.scale, is_parallel=True, dim=0, stride=1)

    def get_query_key_value_tensors(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        """(T, B, H, K), and twice (T, B, G, K)."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **options)
        query, key = (F.normalize(x.float(), dim=-1).to(x.dtype) for x in (query, key))
        return query * self.scale[:, None], key, *rest

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's knows the linears; the scale is split over tensor parallel ranks as heads are."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        dp_cp = (metadata or {}).get("dp_cp_group", self.pg_collection.dp_cp)
        own = make_sharded_tensors_for_checkpoint(
            {"scale": self.scale},
            prefix,
            {"scale": 0},
            sharded_offsets,
            tp_group=self.pg_collection.tp,
            dp_cp_group=dp_cp,
        )
        return {**entries, **own}
