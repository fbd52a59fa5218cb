"""RMSNorm of all heads' queries, or keys, together: tensor parallel ranks hold some heads each.

Shapes: T tokens, B batch, H heads (local), K head width.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class WidthNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over all heads of all ranks, computed in fp32; 1 + weight where zero-centered.

    Args:
        config: megatron-core's.
        hidden_size: K.
        eps: under the root.
        heads: of all tensor parallel ranks.
        group: of tensor parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, heads: int, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.eps, self.width = eps, heads * hidden_size
        own = self.width // config.tensor_model_parallel_size
        self.offset = float(config.layernorm_zero_centered_gamma)
        self.weight = nn.Parameter(torch.full((own,), 1 - self.offset, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.group = group

    def forward(self, x_TBHK: Tensor) -> Tensor:
        """(T, B, H, K) → the same."""
        x = x_TBHK.flatten(-2).float()
        squares = x.square().sum(-1, keepdim=True)
        if self.group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.group)
        normed = x * (squares / self.width + self.eps).rsqrt() * (self.weight.float() + self.offset)
        return normed.to(x_TBHK.dtype).view(x_TBHK.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight as it is split, so that a checkpoint loads at any layout."""
        options: dict[str, Any] = {"tp_group": self.group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight}, prefix, {"weight": 0}, sharded_offsets, **options
        )


class _SumOverRanks(torch.autograd.Function):
    """Each rank's result depends on every rank's summand, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, total = group, x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
