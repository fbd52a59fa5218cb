"""The module classes that a backend offers to the components inside a layer, and what those components share.

Shapes: D width, H heads of this tensor parallel rank.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn


@dataclass(frozen=True)
class Linears:
    """Classes of one backend: megatron-core's own, their emulation of FP8, or Transformer Engine's.

    Attributes:
        column: linear whose output features are split over tensor parallel ranks.
        row: linear whose input features are.
        norm: RMSNorm over the hidden size, aware of sequence parallelism. Where it has `beside`, that gives its input
            as well, and sums the gradients of both.
    """

    column: type
    row: type
    norm: type


class HeadShardedModule(MegatronModule):
    """A component of whole heads per tensor parallel rank: norm, projection to heads, output projection of zeros.

    The projection's features are ordered by head, so a checkpoint's rows fall to any number of ranks.

    Args:
        megatron: megatron-core's configuration.
        groups: process groups; heads are split over `tp`.
        layer_number: from 1.
        linears: classes of the backend.
        width: D.
        heads: over all ranks.
        features: of the projection, per head.
        read_width: what all heads together give to the output projection.
    """

    def __init__(
        self,
        megatron: TransformerConfig,
        groups: ProcessGroupCollection,
        layer_number: int,
        linears: Linears,
        *,
        width: int,
        heads: int,
        features: int,
        read_width: int,
    ) -> None:
        super().__init__(megatron)
        self.groups, self.layer_number = groups, layer_number
        self.heads = heads // groups.tp.size()
        # init_method: never called, initial values are model/initialization.py's.
        options: dict[str, Any] = {
            "config": megatron,
            "init_method": nn.init.zeros_,
            "bias": False,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": groups.tp,
        }
        # Its norm multiplies by its weight in every model, so that a component fits into any.
        plain = copy(megatron)
        plain.layernorm_zero_centered_gamma = False
        self.norm = linears.norm(config=plain, hidden_size=width, eps=megatron.layernorm_epsilon)
        self.projection = linears.column(width, heads * features, gather_output=False, **options)
        self.output = linears.row(read_width, width, input_is_parallel=True, **options)
        nn.init.zeros_(self.output.weight)

    def normed(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of hidden states, and what the residual connection adds to."""
        beside = getattr(self.norm, "beside", None)
        return beside(hidden) if beside else (self.norm(hidden), hidden)

    def of_heads(self, one_head: Tensor) -> nn.Parameter:
        """A tensor for each head of this rank, end to end: one dimension, so that weight decay leaves it alone."""
        parameter = nn.Parameter(one_head.flatten().repeat(self.heads).to(self.config.params_dtype))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Parameters by head, so that a checkpoint loads at any tensor parallel size."""
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        dp_cp = (metadata or {}).get("dp_cp_group", self.groups.dp_cp)
        entries = make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, tp_group=self.groups.tp, dp_cp_group=dp_cp
        )
        for name, module in self.named_children():
            entries |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.groups.tp
            )
        return entries
