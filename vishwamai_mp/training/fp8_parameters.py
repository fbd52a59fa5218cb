"""Weights that stay in FP8 between steps (`fp8.params`), with their fp32 copies in the distributed optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from torch import nn

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.precision.linears import fp8_linears

_WEIGHT = 1  # of a linear layer's quantizers in the forward pass: input, weight, output


def keep_in_fp8(config: PretrainConfig, models: Sequence[Any]) -> None:
    """Round the trained weights of linear layers that compute in FP8, for good.

    Models are built and initialised in bf16, whose numbers the optimizer's fp32 copies begin with: each weight has them
    beside it until the optimizer has taken them.

    Args:
        config: resolved.
        models: chunks of this rank, of Transformer Engine's layers, before gradients have buffers.
    """
    policy = PrecisionPolicy.of_run(config)
    for model in models:
        recipe = get_fp8_recipe(model.config)
        for linear in fp8_linears(model, policy).values():
            if linear.weight.requires_grad:
                _round(linear, recipe)


def forget_bf16(chunks: Sequence[nn.Module]) -> None:
    """Let go of the weights' numbers in bf16, once the optimizer has taken those that are its own.

    It lets go of no others: those of which other replicas keep the fp32 copies.
    """
    for chunk in chunks:
        for weight in chunk.parameters():
            if hasattr(weight, "clear_high_precision_init_val"):
                weight.clear_high_precision_init_val()


@torch.no_grad()
def _round(linear: Any, recipe: Any) -> None:
    from transformer_engine.pytorch import fp8_model_init
    from transformer_engine.pytorch.module.base import _attach_high_precision_init_val

    with fp8_model_init(enabled=True, recipe=recipe):
        linear.init_fp8_metadata()
    quantizer = linear.quantizers["scaling_fwd"][_WEIGHT]
    quantizer.set_usage(rowwise=True, columnwise=True)
    quantizer.internal = False
    before = linear.weight
    weight = nn.Parameter(quantizer(before.detach()))
    for name, value in vars(before).items():  # megatron-core's marks of how it is split
        setattr(weight, name, value)
    _attach_high_precision_init_val(weight, before.detach())
    linear.weight, linear.primary_weights_in_fp8 = weight, True
