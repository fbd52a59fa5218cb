"""Imported once by the process that workers are forked from (see `tests/workers.py`): the stack takes seconds."""

import contextlib
import gc
import importlib
import warnings

_STACK = (
    "vishwamai_mp.runtime",
    "megatron.core.models.gpt",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing",
    "torch.distributed.checkpoint",
    "vishwamai_mp.cache_augmentation",
    "vishwamai_mp.inference",
    "vishwamai_mp.neural_memory",
    "vishwamai_mp.training.callbacks",
    "vishwamai_mp.training.loop",
    "vishwamai_mp.tree_of_thoughts",
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core's, about Transformer Engine and apex
    for _name in _STACK:
        with contextlib.suppress(Exception):  # a worker that needs the module meets its error, with a traceback
            importlib.import_module(_name)
gc.freeze()  # what is shared by all workers is no garbage: neither scan it nor copy its pages
