"""Low-rank adapters beside frozen linear layers (LoRA, arXiv 2106.09685): y = W x + alpha / rank · B A x.

An adapter is split as its layer is. Beside a column-parallel layer A is on every tensor parallel rank and B has the
rank's outputs; beside a row-parallel one A has the rank's inputs and B is on every rank. What travels is R wide.
Shapes: T tokens (local under sequence parallelism), B batch, I in, O out (local), R rank of the adapter.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from vishwamai_mp.config import LoraConfig, PretrainConfig
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.precision.linears import computes_in_fp32

_ROW_PARALLEL = ("linear_proj", "linear_fc2")
_OF_ATTENTION = ("linear_qkv", "linear_proj")
# What happens between A and B, by whether the layer is row-parallel and the sequence is split.
_JOIN: dict[tuple[bool, bool], Callable[..., Tensor]] = {
    (False, False): copy_to_tensor_model_parallel_region,
    (False, True): gather_from_sequence_parallel_region,
    (True, False): reduce_from_tensor_model_parallel_region,
    (True, True): reduce_scatter_to_sequence_parallel_region,
}


class Adapter(nn.Module):
    """Adds to what a linear layer puts out. B begins as zeros; A is drawn by model/initialization.py.

    Args:
        linear: the layer; a fused one normalises what it is given, and so does its adapter.
        target: its name in attention or MLP.
        lora: rank, alpha and dropout.
        megatron: megatron-core's configuration.
        groups: process groups.
        wide: multiply in fp32 and round once, where the machine cannot multiply in what parameters are.
    """

    def __init__(
        self,
        linear: Any,
        target: str,
        lora: LoraConfig,
        megatron: TransformerConfig,
        groups: ProcessGroupCollection,
        wide: bool,
    ) -> None:
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.a = nn.Parameter(linear.weight.new_empty(lora.rank, inputs))
        self.b = nn.Parameter(linear.weight.new_zeros(outputs, lora.rank))
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.groups, self.wide, self.epsilon = groups, wide, megatron.layernorm_epsilon
        self.zero_centered = megatron.layernorm_zero_centered_gamma
        self.is_row, self.is_gated = target in _ROW_PARALLEL, target == "linear_fc1"
        self.sequence_parallel = megatron.sequence_parallel
        split, whole, dim = (self.a, self.b, 1) if self.is_row else (self.b, self.a, 0)
        set_tensor_model_parallel_attributes(split, is_parallel=True, dim=dim, stride=1)
        # A rank sees some tokens only where it keeps the whole matrix: gradients are summed.
        whole.sequence_parallel = megatron.sequence_parallel  # type: ignore[attr-defined]
        linear.register_forward_hook(self._add)

    def _add(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        norm = getattr(linear, "layer_norm_weight", None)
        return output[0] + self(inputs[0] if norm is None else self._normed(inputs[0], norm)), output[1]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the linear layer multiplies where its norm is a part of it."""
        if not self.zero_centered:
            return F.rms_norm(x, weight.shape, weight, self.epsilon)
        return F.rms_norm(x.float(), weight.shape, weight.float() + 1, self.epsilon).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, I) → (T, B, O)."""
        z = self._product(self._dropped(x), self.a) * self.scale
        z = _JOIN[self.is_row, self.sequence_parallel](z, group=self.groups.tp)
        return self._product(z, self.b)

    def _dropped(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        # Inputs that differ from rank to rank take a random stream of the rank's own: under sequence parallelism the
        # whole layer runs on that already.
        apart = self.is_row and not self.sequence_parallel
        with get_cuda_rng_tracker().fork() if apart else contextlib.nullcontext():
            return F.dropout(x, self.dropout)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.wide:
            return F.linear(x, weight)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A and B as they are split, so that a checkpoint loads at any layout."""
        own: dict[str, Any] = {"a": self.a, "b": self.b}
        dp_cp = (metadata or {}).get("dp_cp_group", self.groups.dp_cp)
        axes = {"a": 1} if self.is_row else {"b": 0}
        entries = make_sharded_tensors_for_checkpoint(
            own, prefix, axes, sharded_offsets, tp_group=self.groups.tp, dp_cp_group=dp_cp
        )
        if self.is_gated:  # its outputs are the rank's gates, then its rank's ups
            entries[f"{prefix}b"] = apply_swiglu_sharded_factory(entries[f"{prefix}b"], sharded_offsets)
        return entries


def add_adapters(model: Any, config: PretrainConfig) -> None:
    """Give the layers of a stage or chunk the adapters that `config.lora` asks for.

    They are called `<target>_adapter` and stand beside their linear layers.
    """
    wide = computes_in_fp32(PrecisionPolicy.of_run(config))
    for layer in model.decoder.layers if config.lora.enabled else ():
        for target in config.lora.targets:
            parent = layer.self_attention if target in _OF_ATTENTION else layer.mlp
            linear = getattr(parent, target)
            adapter = Adapter(linear, target, config.lora, model.config, model.pg_collection, wide)
            parent.add_module(f"{target}_adapter", adapter)
