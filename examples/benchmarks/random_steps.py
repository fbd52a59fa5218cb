"""A training step on random tokens, as an arm of a benchmark: no evaluation, no files."""

import itertools
from collections.abc import Callable

import torch

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.runtime import Runtime

# isort: split
from vishwamai_mp.data.batches import BatchStream, DocumentRules
from vishwamai_mp.model import build_model
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
from vishwamai_mp.training.step import TrainStep


class _RandomTokens:
    """Sample number → its tokens, one more than a sequence has."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self._vocabulary, self._length = vocabulary, length

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1, self._vocabulary, (self._length + 1,), generator=generator)


def random_step(config: PretrainConfig, runtime: Runtime) -> Callable[[], object]:
    """Forward, backward and optimizer on a model of its own, whose global batch is one micro-batch."""
    chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
    step = TrainStep(config, runtime, chunks, build_optimizer(config, runtime, chunks))
    stream = BatchStream(
        _RandomTokens(config.model.vocab_size, config.training.sequence_length),
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.micro_batch_size,
        data_rank=0,
        data_parallel_size=1,
        rules=DocumentRules(0, False, False, False),
    )
    numbers = itertools.count()
    return lambda: step.train([next(stream)], next(numbers), 1e-4, float("inf"))
