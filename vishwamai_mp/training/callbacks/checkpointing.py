"""Saves the run every so many steps, at a new lowest validation loss, when it is asked to stop, and at the end."""

from typing import TYPE_CHECKING

from vishwamai_mp.diagnosis.shared import Phase
from vishwamai_mp.runtime.step_journal import phase
from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class Checkpointing(Callback):
    """Drives the trainer's checkpoint manager."""

    order = Order.SAVE

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        with phase(Phase.SAVE):
            self._save_if_due(trainer)

    def on_train_end(self, trainer: "Trainer") -> None:
        with phase(Phase.SAVE):
            trainer.checkpoints.wait()

    def _save_if_due(self, trainer: "Trainer") -> None:
        trainer.checkpoints.poll()
        every, step = trainer.config.checkpoint.save_every, trainer.state.step
        last = step == trainer.config.training.max_steps or trainer.stop_reason is not None
        new_best = trainer.config.checkpoint.load_best and step == trainer.state.best_step
        if last or new_best or (every and step % every == 0):
            trainer.save(final=last)
