"""What lets a layer read on: keys and values of earlier tokens, and what its components know of them.

Training and evaluation read whole rows, and a layer's core attention has all keys at hand. To generate, the same
modules read the new tokens of many sequences laid end to end, and get a `KeyValues` beside them.
Shapes: N new tokens of all sequences, D width, G key-value heads (local), R queries of each, K head width.
"""

import copy
import math
from typing import Any, Protocol

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from vishwamai_mp.model.width_norm import WidthNorm


class KeyValues(Protocol):
    """Keeps what sequences have been read so far. megatron-core passes it to every layer as `inference_context`."""

    def attend(self, layer: int, query_NGRK: Tensor, key_value_NG2K: Tensor) -> Tensor:
        """Keep the new keys and values of layer number `layer` (from 1), and attend to all that a token may see.

        Returns:
            (N, G, R, K).
        """
        ...

    def run_component(self, layer: int, name: str, component: nn.Module, hidden_N1D: Tensor) -> Tensor:
        """Run a component on each sequence, from the state that its earlier tokens left."""
        ...


class KvSelfAttention(SelfAttention):
    """megatron-core's self-attention, whose keys may be kept by a `KeyValues`.

    Args:
        config: megatron-core's.
        *args: megatron-core's.
        full_qk_norm: whether queries and keys are normed over all heads (width_norm.py).
        rotary_factor: of turned queries and keys.
        **options: megatron-core's.
    """

    def __init__(
        self, config: Any, *args: Any, full_qk_norm: bool = False, rotary_factor: float = 1.0, **options: Any
    ) -> None:
        super().__init__(config if rotary_factor == 1 else _with_rotary_factor(config, rotary_factor), *args, **options)
        if full_qk_norm:
            width, eps, group = self.hidden_size_per_attention_head, config.layernorm_epsilon, self.pg_collection.tp
            self.q_layernorm = WidthNorm(config, width, eps, config.num_attention_heads, group)
            self.k_layernorm = WidthNorm(config, width, eps, config.num_query_groups, group)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        inference_context: KeyValues | None = None,
        rotary_pos_emb: Tensor | None = None,
        **options: object,
    ) -> tuple[Tensor, Tensor | None]:
        """As megatron-core has it; with an `inference_context`, hidden states are (N, 1, D) and angles (N, 1, 1, K).

        Without angles nothing is turned.
        """
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **options)
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if rotary_pos_emb is not None:
            factor = _yarn_get_concentration_factor_from_config(self.config)
            query, key = (
                apply_rotary_pos_emb(x, rotary_pos_emb, self.config, mscale=factor, cp_group=self.pg_collection.cp)
                for x in (query, key)
            )
        query_NGRK = query[:, 0].unflatten(1, (key.shape[2], -1))
        key_value_NG2K = torch.stack((key[:, 0], value[:, 0]), 2)
        attended = inference_context.attend(self.layer_number, query_NGRK, key_value_NG2K)
        return self.linear_proj(attended.reshape(len(attended), 1, -1))


def _with_rotary_factor(config: Any, factor: float) -> Any:
    """A copy with attributes (they are no fields) from which megatron-core's attention computes its factor.

    1 + 0.1 · mscale · ln(scaling factor).
    """
    config = copy.copy(config)
    config.yarn_rotary_scaling_factor, config.yarn_mscale, config.yarn_mscale_all_dim = math.e, 10 * (factor - 1), 0.0
    return config
