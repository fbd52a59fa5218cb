"""A shortcut through plain layers: their weights and torch's operators, without the modules between.

A decoding step is many small operations, and what megatron-core's modules do around each of them is a good part of what
it costs. What a layer does is said by its modules; the shortcut takes layers in which it knows every one of them.
Shapes: N tokens of all sequences, D width, R width of a head that is turned, O features (local), V vocabulary (local).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from vishwamai_mp.inference.batch import Batch
from vishwamai_mp.model import VishwamAILayer, VishwamAIModel
from vishwamai_mp.model.core_attention import CoreAttention
from vishwamai_mp.model.gated_units import GatedUnit
from vishwamai_mp.model.key_values import KvSelfAttention
from vishwamai_mp.model.norm import RMSNorm
from vishwamai_mp.model.rotary import angles_of_layer
from vishwamai_mp.model.softcap import softcap
from vishwamai_mp.runtime.products import skinny_linear

Product = Callable[[Tensor], Tensor]


class DirectLayer:
    """The same result as `layer`, from the same weights, within rounding.

    Args:
        layer: one that `supports` takes.
        group: tensor parallel ranks.
    """

    def __init__(self, layer: VishwamAILayer, group: dist.ProcessGroup) -> None:
        self._layer, self._group = layer, group if group.size() > 1 else None
        attention, mlp = layer.self_attention, layer.mlp
        self._norms = layer.input_layernorm.weight, layer.pre_mlp_layernorm.weight
        self._epsilon = layer.config.layernorm_epsilon
        self._qkv, self._projection = _weight(attention.linear_qkv), _weight(attention.linear_proj)
        self._fc1, self._fc2 = _weight(mlp.linear_fc1), _weight(mlp.linear_fc2)
        self._activated = mlp.activation_func.activated
        self._heads = attention.num_query_groups_per_partition
        self._width = attention.hidden_size_per_attention_head
        components = {part for name in layer.component_names for part in getattr(layer, name).modules()}
        self._hooks = _hooks(part for part in layer.modules() if part not in components)

    @staticmethod
    def supports(layer: Any) -> bool:
        """Whether the layer consists of nothing but what is computed here."""
        attention, mlp, config = layer.self_attention, layer.mlp, layer.config
        if not (type(layer) is VishwamAILayer and type(attention) is KvSelfAttention and type(mlp) is MLP):
            return False
        scale = config.softmax_scale or 1 / math.sqrt(attention.hidden_size_per_attention_head)
        columns, rows = (attention.linear_qkv, mlp.linear_fc1), (attention.linear_proj, mlp.linear_fc2)
        return (
            type(attention.core_attention) is CoreAttention
            and attention.core_attention.scale == scale
            and not hasattr(layer, "mlp_output_norm")
            and _is_identity(attention.q_layernorm)
            and _is_identity(attention.k_layernorm)
            and isinstance(mlp.activation_func, GatedUnit)
            and _is_plain_norm(layer.input_layernorm)
            and _is_plain_norm(layer.pre_mlp_layernorm)
            and all(type(linear) is ColumnParallelLinear and linear.bias is None for linear in columns)
            and all(type(linear) is RowParallelLinear and linear.bias is None for linear in rows)
            and not (config.rotary_interleaved or config.no_rope_freq or config.attention_output_gate)
            and not any(name.endswith("_adapter") for name, _ in (*attention.named_children(), *mlp.named_children()))
        )

    @property
    def is_hooked(self) -> bool:
        """Whether somebody listens to what goes through the layer's modules, so that they have to run."""
        return any(self._hooks)

    def __call__(
        self, x_ND: Tensor, batch: Batch, cosine: Tensor, sine: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the layer, (N, D).

        Args:
            x_ND: before it.
            batch: the new tokens.
            cosine, sine: (N, 1, A, R) of the tokens' angles by kind of layer, the sine's first half negated.
            wanted: tokens by number that are to go through the MLP; None: all.
        """
        number = self._layer.layer_number
        for name in self._layer.component_names:
            x_ND = batch.run_component(number, name, getattr(self._layer, name), x_ND[:, None])[:, 0]
        normed = F.rms_norm(x_ND, x_ND.shape[-1:], self._norms[0], self._epsilon)
        qkv = _multiply(normed, self._qkv).contiguous().view(len(x_ND), self._heads, -1, self._width)
        if self._layer.is_turned:
            cosine, sine = (angles_of_layer(x, self._layer.kind) for x in (cosine, sine))
            width = cosine.shape[-1]
            turned = qkv[:, :, :-1, :width]  # of the queries and the key of each group
            turned.copy_(torch.addcmul(turned * cosine, turned.roll(width // 2, -1), sine))
        attended = batch.attend(number, qkv[:, :, :-2], qkv[:, :, -2:]).reshape(len(x_ND), -1)
        if wanted is not None:
            x_ND, attended = x_ND[wanted], attended[wanted]
        alpha = self._layer.residual_multiplier
        x_ND = torch.add(x_ND, self._sum(_multiply(attended, self._projection)), alpha=alpha)
        normed = F.rms_norm(x_ND, x_ND.shape[-1:], self._norms[1], self._epsilon)
        gate, up = _multiply(normed, self._fc1).chunk(2, -1)
        return torch.add(x_ND, self._sum(_multiply(self._activated(gate).mul_(up), self._fc2)), alpha=alpha)

    def _sum(self, partial: Tensor) -> Tensor:
        """Over the tensor parallel ranks."""
        if self._group is not None:
            partial = partial.contiguous()
            dist.all_reduce(partial, group=self._group)
        return partial


class DirectHead:
    """The norm after the last layer and the output layer, in the same way.

    Args:
        model: a last stage that `supports` takes.
    """

    def __init__(self, model: VishwamAIModel) -> None:
        self._norm, self._epsilon = model.decoder.final_layernorm.weight, model.config.layernorm_epsilon
        tied = model.share_embeddings_and_output_weights
        self._multiplier, self._softcap = model.model_config.logit_multiplier, model.model_config.logit_softcap
        self._weight = model.shared_embedding_or_output_weight() if tied else _weight(model.output_layer)
        self._hooks = _hooks((model.decoder.final_layernorm, model.output_layer))

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether the stage has a head, and one that consists of nothing but what is computed here."""
        return (
            model.post_process
            and _is_plain_norm(model.decoder.final_layernorm)
            and type(model.output_layer) is ColumnParallelLinear
            and model.output_layer.bias is None
        )

    @property
    def is_hooked(self) -> bool:
        """As of `DirectLayer`."""
        return any(self._hooks)

    def normed(self, hidden_ND: Tensor) -> Tensor:
        """(N, D)."""
        return F.rms_norm(hidden_ND, hidden_ND.shape[-1:], self._norm, self._epsilon)

    def logits(self, normed_ND: Tensor) -> Tensor:
        """(N, V), this rank's vocabulary."""
        logits = _multiply(normed_ND * self._multiplier if self._multiplier else normed_ND, self._weight)
        return softcap(logits, self._softcap) if self._softcap else logits


def _weight(linear: Any) -> Tensor | Product:
    """A layer's weight, or what multiplies by it where it is packed (inference/packed_weights.py)."""
    return getattr(linear, "packed_weight", linear.weight)


def _multiply(x: Tensor, weight: Tensor | Product) -> Tensor:
    """x Wᵀ, (N, O); of some N it lies in memory as (O, N)."""
    return skinny_linear(x, weight) if isinstance(weight, Tensor) else weight(x)


def _hooks(parts: Iterable[nn.Module]) -> list[Any]:
    """Where modules keep their forward hooks; each is empty as long as there are none."""
    return [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]


def _is_plain_norm(module: nn.Module) -> bool:
    return type(module) is RMSNorm and not module.zero_centered


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, IdentityOp)
