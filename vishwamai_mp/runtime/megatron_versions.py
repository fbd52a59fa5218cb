"""What differs between versions of megatron-core: 0.16.1 to 0.19.2; docs/support.md says which were run.

Import it after `vishwamai_mp.runtime`. Where all versions can be served by one way of writing, that way is written
where it belongs; here is only what asks for a choice.
"""

import inspect
import logging
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

_HUSHED = {  # from 0.18 on, by the logger that says so at each use; it is for whoever maintains this package
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    "megatron.core.dist_checkpointing.strategies.torch": "async save is deprecated",
}
for _logger, _words in _HUSHED.items():
    logging.getLogger(_logger).addFilter(lambda record, words=_words: words not in record.getMessage())  # type: ignore[misc]


def mlp_spec(submodules: MLPSubmodules) -> Any:
    """What megatron-core's layer builds its MLP from."""
    build = getattr(MLP, "as_mlp_submodule", None)  # as 0.19 wants it; what it is given otherwise it wraps, and says so
    return partial(build, submodules=submodules) if build else ModuleSpec(module=MLP, submodules=submodules)


def plan_options() -> dict[str, Any]:
    """Options of `async_save` by which megatron-core plans with its own classes.

    From 0.18 on its default are those of NVIDIA's resiliency extension, which nobody who saves by `writer.py` needs.
    """
    if "async_strategy" not in inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters:
        return {}
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
