"""Shows a person how far training is: a bar on a terminal, lines elsewhere."""

import sys
import time
from typing import TYPE_CHECKING

from tqdm import tqdm

from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class Progress(Callback):
    """Loss, throughput and time left, from rank 0."""

    order = Order.REPORT

    def on_train_begin(self, trainer: "Trainer") -> None:
        self.total, self.first = trainer.config.training.max_steps, trainer.state.step
        self.start = time.monotonic()
        wanted = trainer.config.logging.progress_bar and trainer.runtime.reports
        self.bar = (
            tqdm(total=self.total, initial=self.first, unit="step", dynamic_ncols=True)
            if wanted and sys.stderr.isatty()
            else None
        )
        self.lines = wanted and self.bar is None

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        step = trainer.state.step
        shown = {"loss": f"{record['lm_loss']:.4f}", "tok/s": f"{record['tokens_per_second']:,.0f}"}
        if "validation_loss" in record:
            shown["validation loss"] = f"{record['validation_loss']:.4f}"
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(shown)
        elif self.lines and (step % trainer.config.logging.log_every == 0 or step == self.total):
            left = (time.monotonic() - self.start) / (step - self.first) * (self.total - step)
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"step {step}/{self.total}  {text}  {_duration(left)} left", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: "Trainer") -> None:
        if self.bar is not None:
            self.bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
