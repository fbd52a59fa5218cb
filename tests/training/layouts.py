"""Runs the same few training steps at any layout: the subject of the equivalence tests."""

import itertools
from typing import Any

import torch

from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.data.batches import BatchStream, DocumentRules
from vishwamai_mp.data.marks import BEGINS, JUDGED, LEARNT, SOLVED
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import initialize, shutdown
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
from vishwamai_mp.training.schedule import learning_rate
from vishwamai_mp.training.step import TrainStep

SMALL: dict[str, Any] = {
    "model": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 250,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    },
    "parallel": {"use_distributed_optimizer": False},
    "optimizer": {"learning_rate": 1e-3},
    "precision": "fp32",
    "training": {"sequence_length": 32, "micro_batch_size": 2, "global_batch_size": 8, "max_steps": 10, "threads": 1},
}


class RandomSamples:
    """Endless samples, a function of their number, with end-of-document tokens (0) here and there."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self.vocab_size, self.length = vocab_size, length

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index % 16)  # few samples, so that there is something to learn
        text = torch.randint(1, self.vocab_size, (self.length + 1,), generator=generator)
        return text.masked_fill(torch.rand(self.length + 1, generator=generator) < 0.1, 0)


class RandomRows(RandomSamples):
    """The same with marks: documents begin behind those tokens, and of some tokens verdicts are known."""

    def __getitem__(self, index: int) -> torch.Tensor:
        text = super().__getitem__(index)
        generator = torch.Generator().manual_seed(index % 16)
        judged, solved = torch.rand(2, self.length + 1, generator=generator) < 0.3
        begins = text.roll(1) == 0
        begins[0] = True
        return torch.stack((text, begins * BEGINS | ~begins * LEARNT | judged * (JUDGED | solved * SOLVED)))


def train(overrides: list[str], steps: int = 4) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, as this rank sees them."""
    import torch.distributed as dist

    config = resolve(load_config(SMALL, overrides), dist.get_world_size())
    runtime = initialize(config)
    chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
    optimizer = build_optimizer(config, runtime, chunks)
    step = TrainStep(config, runtime, chunks, optimizer)
    data, training = config.data, config.training
    samples = RandomRows if data.prepared_rows else RandomSamples
    stream = BatchStream(
        samples(config.model.vocab_size, training.sequence_length),
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        data_rank=runtime.data_rank,
        data_parallel_size=runtime.data_parallel_size,
        context_rank=runtime.groups.cp.rank(),
        context_parallel_size=runtime.groups.cp.size(),
        rules=DocumentRules(
            0, data.reset_attention_mask, data.reset_position_ids, data.eod_mask_loss, marked=data.prepared_rows
        ),
    )
    curve = []
    for number in range(steps):
        batches = list(itertools.islice(stream, stream.micro_batches_per_step))
        result = step.train(batches, number, learning_rate(config, number), float("inf"))
        assert result.updated
        curve.append((result.lm_loss, result.grad_norm))
    shutdown(keep_world=True)
    return curve
