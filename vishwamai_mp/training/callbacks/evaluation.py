"""Measures the loss on validation data every so many steps and at the end."""

import math
from typing import TYPE_CHECKING

from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer, TrainerState


class Evaluation(Callback):
    """Adds `validation_loss` (nats per token) and `validation_perplexity` to the record of the step."""

    order = Order.MEASURE

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        every, step = trainer.config.training.evaluate_every, trainer.state.step
        if every and (step % every == 0 or step == trainer.config.training.max_steps):
            loss = trainer.evaluate()
            record["validation_loss"] = loss
            record["validation_perplexity"] = math.exp(min(loss, 700.0))  # e^710 overflows a double
            _note(trainer.state, loss)


def _note(state: "TrainerState", loss: float) -> None:
    """Remember it if it is the lowest so far; a loss that is not finite never is."""
    state.evaluations_since_best += 1
    if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
        state.best_loss, state.best_step, state.evaluations_since_best = loss, state.step, 0
