"""Ends training early and in order: on SIGTERM, SIGINT or after a set time."""

import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class Stopping(Callback):
    """Asks the loop to stop when any rank got a signal or the time is up; the loop then saves and exits with 0.

    All ranks must stop after the same step, so they agree after each: one number, the maximum over the job.
    """

    order = Order.MEASURE

    def __init__(self, exit_after_minutes: float | None) -> None:
        self.deadline = time.monotonic() + 60 * exit_after_minutes if exit_after_minutes else None
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, trainer: "Trainer") -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        late = self.deadline is not None and time.monotonic() > self.deadline
        wish = torch.tensor([self.signal or 0, int(late)], device=trainer.runtime.device)
        dist.all_reduce(wish, dist.ReduceOp.MAX)
        number, late = wish.tolist()
        if number:
            trainer.stop_reason = f"signal {signal.Signals(number).name}; the same command continues"
        elif late:
            trainer.stop_reason = "training.exit_after_minutes; the same command continues"
        trainer.goes_on_later |= bool(number or late)

    def on_train_end(self, trainer: "Trainer") -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
