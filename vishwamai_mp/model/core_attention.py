"""Core attention for machines without Transformer Engine.

Shapes: B batch, Q query tokens, S key tokens, H heads (local), G key-value heads (local), K head width.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from vishwamai_mp.model.blocked_attention import blocked_attention
from vishwamai_mp.model.rebuilt_attention import rebuilt_attention
from vishwamai_mp.runtime import is_accelerator, multiplies_natively
from vishwamai_mp.runtime.choices import Choice
from vishwamai_mp.runtime.products import cpu_multiplies

_LONGEST = 2048  # queries: blocked attention keeps weights, of which there are as many as pairs of tokens


class CoreAttention(MegatronModule):
    """softmax(QKᵀ/√K + mask)V with grouped queries; under context parallelism keys and values are gathered.

    On CPUs by `blocked_attention`, torch's fused kernel or, in bf16, `rebuilt_attention`, whichever is fastest; beyond
    `_LONGEST` queries or with dropout by the kernel, which knows no soft cap. In fp32 where the CPU cannot multiply
    16-bit matrices in hardware.
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
        softcap: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.softcap = softcap
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
        if attention_mask is None and queries < keys and (queries > 1 or self.softcap):
            ones = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
            attention_mask = ones.tril(keys - queries)
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
        wide = q.dtype if multiplies_natively(q.dtype) else torch.float32
        q_BHQK, k_BGSK, v_BGSK = (x.to(wide) for x in (q, k, v))
        by_blocks = not is_accelerator(q) and 1 < q.shape[2] <= _LONGEST and not dropout
        if by_blocks or self.softcap:
            repeat = q.shape[1] // k.shape[1]
            k_BHSK, v_BHSK = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (k_BGSK, v_BGSK))
            if self.softcap:
                return blocked_attention(q_BHQK, k_BHSK, v_BHSK, mask, self.scale, self.softcap).to(q.dtype)
            attention = _ATTENTION.get((wide, q.shape[2] > _SHORT), blocked_attention)
            return attention(q_BHQK, k_BHSK, v_BHSK, mask, self.scale).to(q.dtype)
        return F.scaled_dot_product_attention(
            q_BHQK,
            k_BGSK,
            v_BGSK,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and q.shape[2] > 1,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        ).to(q.dtype)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `blocked_attention`, by torch's kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


def _drawn(dtype: torch.dtype, length: int) -> list[tuple[Any, ...]]:
    """Of 1,024 tokens, laid out as they come from the projection."""
    random = torch.Generator().manual_seed(0)
    shape = (length, 1024 // length, 8, 64)
    q, k, v = (torch.randn(shape, generator=random).to(dtype).requires_grad_().permute(1, 2, 0, 3) for _ in range(3))
    return [(q, k, v, None, 0.125)]


_SHORT = 768  # queries; the longer, the more torch's kernel gains
_ATTENTION = {
    (dtype, long): Choice(
        f"{'long' if long else 'short'}_attention_{name}",
        {
            "blocked": blocked_attention,
            "fused": _fused_attention,
            **({"rebuilt": rebuilt_attention} if dtype == torch.bfloat16 else {}),
        },
        partial(_drawn, dtype, 1024 if long else 512),
        trained=True,
    )
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))
    for long in (False, True)
    if cpu_multiplies(dtype)  # another is widened before it comes here
}
