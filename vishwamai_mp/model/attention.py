"""Core attention for machines without Transformer Engine.

Shapes: B batch, Q query tokens, S key tokens, H heads (local), G key-value heads (local), K head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from vishwamai_mp.runtime import multiplies_natively


class CoreAttention(MegatronModule):
    """softmax(QKᵀ/√K + mask)V with grouped queries; under context parallelism keys and values are gathered.

    16-bit inputs go through explicit matrix products where the CPU has 16-bit hardware (torch's fused kernel reaches
    0.76 of their speed there, at sequence 512), and through the fused kernel in fp32 where it has none. fp32 uses the
    fused kernel (1.9 × the explicit products).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query (Q, B, H, K), key and value (S, B, G, K), mask (1 or B, 1, Q, S) True where allowed → (Q, B, H·K).

        Without a mask the last query stands at the last key, and each sees the keys up to its own place.
        """
        assert attention_bias is None
        assert packed_seq_params is None
        if self.context_group.size() > 1:
            key, value = (
                tensor_parallel.gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group)
                for x in (key, value)
            )
        queries, keys = query.shape[0], key.shape[0]
        if attention_mask is None and 1 < queries < keys:
            attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        q_BHQK, k_BGSK, v_BGSK = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if dropout and not self.config.sequence_parallel:
            # Heads are sharded, so each tensor parallel rank draws its own; under sequence parallelism the whole
            # layer runs in the tracker's sharded stream already.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                out_BHQK = self._attend(q_BHQK, k_BGSK, v_BGSK, attention_mask, dropout)
        else:
            out_BHQK = self._attend(q_BHQK, k_BGSK, v_BGSK, attention_mask, dropout)
        return out_BHQK.permute(2, 0, 1, 3).reshape(queries, query.shape[1], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        causal = mask is None and q.shape[2] > 1
        if q.dtype == torch.float32 or q.is_cuda or not multiplies_natively(q.dtype):
            wide = q.dtype if q.is_cuda else torch.float32
            return F.scaled_dot_product_attention(
                q.to(wide),
                k.to(wide),
                v.to(wide),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            ).to(q.dtype)
        return _explicit_attention(q, k, v, mask, causal, dropout, self.scale)


def _explicit_attention(
    q_BHQK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
) -> Tensor:
    """Attention as two matrix products with an fp32 softmax between. (B, H, Q, K)."""
    repeat = q_BHQK.shape[1] // k_BGSK.shape[1]
    if repeat > 1:
        k_BGSK, v_BGSK = (x.repeat_interleave(repeat, dim=1) for x in (k_BGSK, v_BGSK))
    if causal:
        mask = torch.ones(q_BHQK.shape[2], k_BGSK.shape[2], dtype=torch.bool, device=q_BHQK.device).tril()
    scores_BHQS = (q_BHQK @ k_BGSK.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores_BHQS = scores_BHQS.masked_fill(~mask, -torch.inf)
    weights_BHQS = F.dropout(scores_BHQS.softmax(dim=-1), dropout)
    return weights_BHQS.to(v_BGSK.dtype) @ v_BGSK
