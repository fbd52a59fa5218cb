"""Imported once by the process that workers are forked from (see `tests/workers.py`): the stack takes seconds."""

import contextlib
import gc
import importlib
import warnings
from typing import Any

_STACK = (
    "pytest",
    "vishwamai_mp.runtime",
    "megatron.core.models.gpt",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing",
    "torch._dynamo",  # which the first optimizer of a process would import
    "torch.distributed.checkpoint",
    "vishwamai_mp.cache_augmentation",
    "vishwamai_mp.inference",
    "vishwamai_mp.neural_memory",
    "vishwamai_mp.training.callbacks",
    "vishwamai_mp.training.loop",
    "vishwamai_mp.tree_of_thoughts",
)

_filters: list[Any] = warnings.filters  # type: ignore[assignment]  # a list, of which the stub says less
_silence = ("ignore", None, Warning, None, 0)
gc.disable()  # what is imported stays
_filters.insert(0, _silence)  # megatron-core warns about Transformer Engine and apex while it is imported
for _name in _STACK:
    with contextlib.suppress(Exception):  # a worker that needs the module meets its error, with a traceback
        importlib.import_module(_name)
_filters.remove(_silence)  # and only that: what the stack itself says about warnings stays
gc.freeze()  # what is shared by all workers is no garbage: neither scan it nor copy its pages
gc.enable()
