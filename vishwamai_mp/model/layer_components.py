"""Which layers carry which components."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from vishwamai_mp.components.head_sharded import Linears
from vishwamai_mp.config import PretrainConfig


def layer_components(config: PretrainConfig, layer: int, linears: Linears) -> dict[str, Callable[..., nn.Module]]:
    """What makes the components of a layer, in the order they run.

    Args:
        config: resolved.
        layer: number in the whole model, from 0.
        linears: classes of this machine's backend.
    """
    made: dict[str, Any] = {}
    if config.memory.enabled and layer in (config.memory.layers or ()):
        from vishwamai_mp.neural_memory import ReasoningMemoryTransformer

        made["memory"] = partial(ReasoningMemoryTransformer, config.memory, linears=linears)
    if config.cache.enabled and layer in (config.cache.layers or ()):
        from vishwamai_mp.cache_augmentation import DifferentiableCacheAugmentation

        made["cache"] = partial(DifferentiableCacheAugmentation, config.cache, linears=linears)
    return dict(reversed(made.items())) if config.cache.before_memory else made
