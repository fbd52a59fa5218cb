"""Writes the metrics of logged steps to the run folder."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from vishwamai_mp.observability.environment import write_run_description
from vishwamai_mp.observability.writers import MetricWriter, open_writers
from vishwamai_mp.runtime.device import peak_memory_gib
from vishwamai_mp.training.callbacks.base import Callback, Order, is_logged

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class Metrics(Callback):
    """`metrics.jsonl`, TensorBoard and Weights & Biases, from rank 0."""

    order = Order.WRITE

    def __init__(self) -> None:
        self.writers: list[MetricWriter] = []

    def on_train_begin(self, trainer: "Trainer") -> None:
        if trainer.runtime.reports:
            begins = trainer.state.step < trainer.config.training.max_steps
            if begins or not (trainer.folder / "config.yaml").exists():  # else it would describe steps it did not do
                write_run_description(trainer.folder, trainer.config, trainer.runtime)
            self.writers = open_writers(trainer.folder, trainer.config, trainer.state.step)

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        if not is_logged(trainer, record):
            return
        memory = torch.tensor(peak_memory_gib(), device=trainer.runtime.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)  # the fullest rank is the one that will run out
        record["memory_gib"] = memory.item()
        for writer in self.writers:
            writer.write(trainer.state.step, record)

    def on_train_end(self, trainer: "Trainer") -> None:
        for writer in self.writers:
            writer.close()
