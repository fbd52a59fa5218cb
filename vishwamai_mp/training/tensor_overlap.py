"""Exchanges of tensor parallel ranks while products run (`parallel.overlap_tensor_parallel`)."""

from collections.abc import Iterator, Sequence
from typing import Any

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.config.check_tensor_overlap import exchanged_tokens
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.runtime.exchange_buffers import open_exchange_buffers

# Transformer Engine's names of a layer's products, by ours.
_NAMES = {"linear_qkv": "qkv", "linear_proj": "proj", "linear_fc1": "fc1", "linear_fc2": "fc2"}


def overlap_exchanges(config: PretrainConfig, models: Sequence[Any]) -> None:
    """Let the linear layers of attention and MLP gather their inputs, and sum their outputs, beside their products.

    Those of components exchange as ever: their widths are others. So do layers in bf16 among layers in FP8, for which
    buffers of bf16 would come on top of those of FP8. It is told to the layers, not to megatron-core's configuration,
    which would ask the components' layers for names too, and a model opened for inference for buffers.

    Args:
        config: resolved.
        models: chunks of this rank, of Transformer Engine's layers; what is frozen in them is.
    """
    policy, tensor = PrecisionPolicy.of_run(config), config.parallel.tensor_model_parallel_size
    shape = (exchanged_tokens(config), config.model.hidden_size)
    open_exchange_buffers(shape, tensor, policy.compute, in_fp8=policy.fp8 is not None)
    for model in models:
        for layer in model.decoder.layers:
            if policy.fp8 is None or policy.fp8.applies_to(layer.layer_number - 1, config.model.num_layers):
                for name, linear in _linears(layer):
                    _overlap(linear, _NAMES[name])


def _linears(layer: Any) -> Iterator[tuple[str, Any]]:
    for part in (layer.self_attention, layer.mlp):
        for name, child in part.named_children():
            if name in _NAMES:
                yield name, child


def _overlap(linear: Any, name: str) -> None:
    """As Transformer Engine's constructor sets it, except for frozen weights.

    Beside the product of a weight's gradient travel the input that it multiplies, and the input's gradient. A frozen
    weight has no such product: Transformer Engine would then hand on the input's gradient without its sum over ranks.
    """
    linear.ub_name = name
    if linear.parallel_mode == "row":
        linear.ub_overlap_rs_fprop = linear.ub_overlap_ag_dgrad = True
    else:
        linear.ub_overlap_ag_fprop = True
        linear.ub_bulk_dgrad = linear.ub_bulk_wgrad = linear.weight.requires_grad
