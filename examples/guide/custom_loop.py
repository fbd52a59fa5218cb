#!/usr/bin/env python3
"""A training loop of one's own, over the core's parts.

    python examples/guide/custom_loop.py --data corpus_text_document --steps 50
    torchrun --nproc-per-node 2 examples/guide/custom_loop.py --data corpus_text_document \\
        parallel.tensor_model_parallel_size=2

`training.loop.Trainer` adds to this callbacks (metrics, checkpoints, evaluation, stopping), resuming, and skipping
steps whose loss spikes. The loop here does what it likes between steps: it repeats a step whose loss is far above the
mean, with half the learning rate.
"""

import argparse
import itertools

from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.data.batches import train_stream
from vishwamai_mp.data.datasets import build_datasets
from vishwamai_mp.model import build_model
from vishwamai_mp.runtime import distributed_session, run_distributed_program
from vishwamai_mp.runtime.distributed import world_size
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel
from vishwamai_mp.training.schedule import learning_rate
from vishwamai_mp.training.step import TrainStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="a preset or a recipe")
    parser.add_argument("--data", required=True, help="a .bin/.idx prefix")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    settings = [f"data.train={options.data}", f"training.max_steps={options.steps}", *options.overrides]
    config = resolve(load_config(options.config, settings), world_size())
    with distributed_session(config) as runtime:
        datasets = build_datasets(config, None, runtime)
        chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
        optimizer = build_optimizer(config, runtime, chunks)
        steps = TrainStep(config, runtime, chunks, optimizer)
        stream = train_stream(config, datasets, runtime)
        mean = None
        for step in range(options.steps):
            batches = list(itertools.islice(stream, stream.micro_batches_per_step))
            rate = learning_rate(config, step)
            limit = float("inf") if mean is None else 1.5 * mean
            result = steps.train(batches, step, rate, loss_limit=limit)
            if not result.updated:
                result = steps.train(batches, step, rate / 2, loss_limit=float("inf"))
            mean = result.lm_loss if mean is None else 0.9 * mean + 0.1 * result.lm_loss
            if runtime.reports:
                print(f"step {step + 1}  loss {result.lm_loss:.4f}  rate {rate:.2e}  norm {result.grad_norm:.3f}")


if __name__ == "__main__":
    run_distributed_program(main)
