"""Writes what FP8 does to each linear layer's operands, every so many steps."""

from typing import TYPE_CHECKING

from vishwamai_mp.config import ConfigError
from vishwamai_mp.config.errors import leave_out
from vishwamai_mp.observability.writers import JsonLines
from vishwamai_mp.precision import PrecisionPolicy, use_transformer_engine
from vishwamai_mp.precision.statistics import Fp8Statistics
from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer

FP8_FILE = "fp8.jsonl"


class Fp8Report(Callback):
    """`fp8.jsonl` in the run folder, from rank 0; `tools/fp8_report.py` shows it.

    One line per reported step, with `LAYER/OPERAND/WHAT` as keys, `layers.7.mlp.linear_fc1/gradient/underflow` for one.

    Args:
        every: steps.
    """

    order = Order.WATCH

    def __init__(self, every: int) -> None:
        self.every = every
        self.file: JsonLines | None = None

    def on_train_begin(self, trainer: "Trainer") -> None:
        if use_transformer_engine(PrecisionPolicy.of_run(trainer.config)):
            raise ConfigError(
                f"fp8.report_every={self.every}: Transformer Engine's layers do not show their operands;"
                f" {leave_out('fp8.report_every')}"
                " on this GPU"
            )
        if trainer.runtime.reports:
            self.file = JsonLines(trainer.folder / FP8_FILE, trainer.state.step)
        self.statistics = Fp8Statistics([chunk.module for chunk in trainer.chunks])
        self._observe_if_due(trainer)

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        if trainer.state.step % self.every == 0:
            found = self.statistics.take()
            if self.file:
                lines = {
                    f"{statistics.layer}/{statistics.operand}/{what}": value
                    for statistics in found
                    for what, value in statistics.numbers().items()
                }
                self.file.write(trainer.state.step, lines)
        self._observe_if_due(trainer)

    def on_train_end(self, trainer: "Trainer") -> None:
        if self.file:
            self.file.close()

    def _observe_if_due(self, trainer: "Trainer") -> None:
        self.statistics.observe((trainer.state.step + 1) % self.every == 0)
