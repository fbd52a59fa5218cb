"""What differs between versions of megatron-core: 0.16.1, and 0.19.2 as far as docs/support.md says.

Import it after `vishwamai_mp.runtime`. Where all versions can be served by one way of writing, that way is written
where it belongs; here is only what asks for a choice.
"""

import inspect
import logging
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as _torch_strategies
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor


class _NotDeprecated(logging.Filter):
    """Drops what 0.19 says at each first save: its own writer is to go. Ours takes only the plan from it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "async save is deprecated" not in record.getMessage()


def plan_options() -> dict[str, Any]:
    """Options of `async_save` by which megatron-core plans with its own classes.

    From 0.18 on its default are those of NVIDIA's resiliency extension, which nobody who saves by `writer.py` needs.
    """
    if "async_strategy" not in inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters:
        return {}
    _torch_strategies.logger.addFilter(_NotDeprecated())
    return {"async_strategy": "mcore"}


def is_marked(weight: Tensor) -> bool:
    """Whether megatron-core has said of a parameter whether it is a shard.

    From 0.17 on its linear layers do so, whether they fill the parameter in or not.
    """
    return hasattr(weight, "tensor_model_parallel")


def gradients_for_norm(optimizer: Any) -> list[Tensor]:
    """This rank's gradients that the norm over all ranks is made of, each counted on one rank.

    Args:
        optimizer: one of megatron-core's, not chained.
    """
    older = getattr(optimizer, "get_main_grads_for_grad_norm", None)
    return older() if older else optimizer.get_grads_for_grad_norm()  # its name in 0.19.2
