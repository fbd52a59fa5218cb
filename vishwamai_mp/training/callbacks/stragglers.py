"""Looks every so many steps at which ranks are slow, and at what all of them did in the last step."""

import socket
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from vishwamai_mp.observability.timeline import RankTimes, counters, rank_times, stragglers, timeline_of
from vishwamai_mp.runtime.step_journal import current_journal
from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class Stragglers(Callback):
    """Writes `timeline.json`, from rank 0, in jobs of several processes; says which ranks are far slower than the rest.

    Ranks exchange a few kilobytes each time; between, nothing is added to a step.

    Args:
        every: steps.
    """

    order = Order.WRITE

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_begin(self, trainer: "Trainer") -> None:
        self._begin_window(trainer)

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        step, runtime = trainer.state.step, trainer.runtime
        if step % self.every or runtime.world_size == 1:
            return
        found: list[RankTimes | None] = [None] * runtime.world_size
        dist.gather_object(self._own(trainer), found if runtime.reports else None, dst=0)
        if runtime.reports:
            timeline = timeline_of(step, step - self.first, [times for times in found if times is not None])
            timeline.write(trainer.folder)
            for text in stragglers(timeline):
                trainer.say(text)
        self._begin_window(trainer)

    def _begin_window(self, trainer: "Trainer") -> None:
        journal = current_journal()
        assert journal is not None, "training keeps a journal"
        self.first, self.before = trainer.state.step, counters(journal.words)

    def _own(self, trainer: "Trainer") -> RankTimes:
        journal, runtime, step = current_journal(), trainer.runtime, trainer.state.step
        assert journal is not None
        return rank_times(
            *(runtime.rank, socket.gethostname(), journal.words, journal.groups, self.before, step - self.first, step),
            world=runtime.world_size,
            offset=time.time_ns() - time.monotonic_ns(),
        )
