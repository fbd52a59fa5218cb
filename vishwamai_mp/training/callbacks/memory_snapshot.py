"""The history of a GPU's memory over the profiled steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vishwamai_mp.config.files import written_whole
from vishwamai_mp.runtime.profiling import has_memory_history, record_memory_history, write_memory_history
from vishwamai_mp.training.callbacks.base import Callback, Order
from vishwamai_mp.training.callbacks.profiler import PROFILE_FOLDER, profile_name

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class MemorySnapshot(Callback):
    """`profile/steps_00000011-00000013_rank0_memory.pickle`, which https://pytorch.org/memory_viz shows.

    A CPU's allocator keeps no history; there the profile counts what each operator allocates instead.

    Args:
        first, last: steps, from 1, both included.
        ranks: whose memory is watched.
    """

    order = Order.WATCH

    def __init__(self, first: int, last: int, ranks: Sequence[int]) -> None:
        self.first, self.last, self.ranks = first, last, ranks
        self.begun = 0  # 0: not recording

    def on_train_begin(self, trainer: "Trainer") -> None:
        if not has_memory_history():
            trainer.say(
                "logging.memory_snapshot: without a GPU there is no history of memory; the profile's table shows what"
                " each operator allocated instead"
            )

    def on_step_begin(self, trainer: "Trainer") -> None:
        step = trainer.state.step + 1
        due = self.first <= step <= self.last and trainer.runtime.rank in self.ranks
        if due and not self.begun and has_memory_history():
            self.begun = step
            record_memory_history()

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        if trainer.state.step == self.last:
            self._finish(trainer)

    def on_train_end(self, trainer: "Trainer") -> None:
        self._finish(trainer)

    def _finish(self, trainer: "Trainer") -> None:
        if not self.begun:
            return
        folder = trainer.folder / PROFILE_FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"{profile_name(self.begun, trainer.state.step, trainer.runtime.rank)}_memory.pickle"
        with written_whole(path) as aside:
            write_memory_history(aside)
        self.begun = 0
