"""Shows a person what runs and how far it is: a table, a bar on a terminal or lines elsewhere, and the outcome."""

import sys
import time
from typing import TYPE_CHECKING

from tqdm import tqdm

from vishwamai_mp.observability.goodput_ledger import read_ledger
from vishwamai_mp.training.callbacks.base import Callback, Order, is_logged
from vishwamai_mp.training.summary import closing_lines, duration, loss_text, losses_of, opening_lines, planned_text

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class Progress(Callback):
    """Losses, learning rate, gradient norm, throughput and time left, from rank 0."""

    order = Order.REPORT

    def on_train_begin(self, trainer: "Trainer") -> None:
        self.total, self.first = trainer.config.training.max_steps, trainer.state.step
        self.record: dict[str, float] = {}
        self.bar = None
        if self.first >= self.total:
            of = " of" if self.first == self.total else ", beyond"
            trainer.say(
                f"nothing to do: the run in {trainer.config.training.output_dir} has finished step {self.first}{of}"
                f" training.max_steps={self.total}; raise training.max_steps to train on, or name another"
                " training.output_dir"
            )
            return
        trainer.say(opening_lines(trainer.config, trainer.runtime, self.first))
        self.start = time.monotonic()
        wanted = trainer.config.logging.progress_bar and trainer.runtime.reports
        if wanted and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=self.first, unit="step", dynamic_ncols=True)
        self.lines = wanted and self.bar is None

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        step, self.record = trainer.state.step, record
        shown = {name: loss_text(value) for name, value in losses_of(record).items()}
        shown["lr"], shown["grad norm"] = f"{record['learning_rate']:.2e}", f"{record['grad_norm']:.3g}"
        shown["tok/s"] = f"{record['tokens_per_second']:,.0f}"
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(shown)
        elif self.lines and is_logged(trainer, record):
            left = (time.monotonic() - self.start) / (step - self.first) * (self.total - step)
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            trainer.say(f"step {step}/{self.total}  {text}  {duration(left)} left")

    def on_train_end(self, trainer: "Trainer") -> None:
        if self.bar is not None:
            self.bar.close()
        if not self.record:
            return
        state, seconds = trainer.state, time.monotonic() - self.start
        best = None if state.best_step is None or state.best_loss is None else (state.best_step, state.best_loss)
        if trainer.runtime.reports:
            ledger = read_ledger(trainer.folder)
            planned = planned_text(trainer.config, trainer.runtime, self.record)
            trainer.say(closing_lines(trainer.config, state.step, seconds, self.record, best, ledger, planned))
