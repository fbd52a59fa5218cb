"""Parts of a model that are not trained."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from vishwamai_mp.config import PretrainConfig, frozen_parts

# Of a parameter's name; what matches nothing is the base's.
_PARTS = {
    "adapter": re.compile(r"_adapter\.[ab]$"),
    "memory": re.compile(r"\.memory\."),
    "cache": re.compile(r"\.cache\."),
    "value_head": re.compile(r"^value_head\."),
    "embedding": re.compile(r"^(embedding\.word_embeddings|output_layer)\."),
}


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to, by its name in the model."""
    return next((part for part, pattern in _PARTS.items() if pattern.search(name)), "base")


def freeze_parts(model: Any, config: PretrainConfig) -> None:
    """Let the parameters of `training.freeze`, and with adapters those of the base, have no gradient."""
    frozen = frozen_parts(config)
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)
    stages = config.parallel.pipeline_model_parallel_size
    if "embedding" in frozen and model.pre_process and (stages > 1 or config.training.recompute != "none"):
        model.embedding.register_forward_hook(_give_gradient)


def _give_gradient(_: nn.Module, inputs: Any, hidden: Tensor) -> Tensor:
    """Pipelines and recomputation run a backward pass only from what came in with a gradient."""
    return hidden.requires_grad_() if torch.is_grad_enabled() else hidden
