"""A few training steps from a checkpoint, on random tokens, at any layout: for comparing layouts with each other."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
import torch
import torch.distributed as dist

from vishwamai_mp.checkpoint import CheckpointManager
from vishwamai_mp.config import PretrainConfig, load_config, resolve, to_yaml
from vishwamai_mp.data.batches import BatchStream
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import distributed_session
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
from vishwamai_mp.training.step import TrainStep

Losses = list[float]

# name: (processes, settings)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "TP1": (1, []),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "TP2 SP": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "CP2": (2, ["parallel.context_parallel_size=2"]),
}
_MOST_TOKENS = 64  # of a sequence


class _RandomSamples:
    """Endless samples of a vocabulary, each a function of its number."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self._vocab_size, self._length = vocab_size, length

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(self._vocab_size, (self._length + 1,), generator=generator)


def training_config(run: Path, overrides: Sequence[str], processes: int) -> PretrainConfig:
    """The configuration of such a training, resolved.

    Args:
        run: a run folder with a checkpoint of step 0.
        overrides: the layout, and what else is to differ from the run's.
        processes: of the layout.

    Raises:
        ConfigError: the model cannot be laid out so.
    """
    saved = load_config(run / "config.yaml")
    length = min(_MOST_TOKENS, saved.model.max_position_embeddings // 4 * 4)  # context parallelism cuts in 4
    settings = [
        *("precision=fp32", f"training.sequence_length={length}", "training.threads=1"),
        *("training.micro_batch_size=1", "training.global_batch_size=2"),
    ]
    return resolve(load_config(run / "config.yaml", [*settings, *overrides]), processes)


def train(
    run: Path, overrides: Sequence[str], steps: int, learning_rate: float = 1e-4, output: Path | None = None
) -> Losses:
    """On every rank of the layout: train from the run's checkpoint.

    Args:
        run, overrides: as `training_config` has them.
        steps: so many.
        learning_rate: of each.
        output: a run folder to write afterwards, with the trained weights as a checkpoint of step 0.

    Returns:
        the loss of each step, in nats.
    """
    config = training_config(run, overrides, dist.get_world_size() if dist.is_initialized() else 1)
    checkpoint = run / "checkpoints/step_00000000"
    with distributed_session(config) as runtime:
        chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
        optimizer = build_optimizer(config, runtime, chunks)
        CheckpointManager(checkpoint.parent, config, runtime).load(checkpoint, chunks, optimizer, weights_only=True)
        step, training = TrainStep(config, runtime, chunks, optimizer), config.training
        stream = BatchStream(
            _RandomSamples(config.model.vocab_size, training.sequence_length),
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            data_rank=runtime.data_rank,
            data_parallel_size=runtime.data_parallel_size,
        )
        losses = []
        for number in range(steps):
            batches = list(itertools.islice(stream, stream.micro_batches_per_step))
            losses.append(step.train(batches, number, learning_rate, float("inf")).lm_loss)
        if output is not None:
            if runtime.reports:
                output.mkdir(parents=True, exist_ok=True)
                (output / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            CheckpointManager(output / "checkpoints", config, runtime).save(0, chunks, None, {})
    return losses
