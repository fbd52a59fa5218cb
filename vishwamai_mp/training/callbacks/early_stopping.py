"""Ends training when the validation loss no longer falls."""

from typing import TYPE_CHECKING

from vishwamai_mp.config.wording import counted
from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class EarlyStopping(Callback):
    """Asks the loop to stop after evaluations in a row without a new lowest loss.

    A resumed run counts on; one that had ended this way ends at once.

    Args:
        patience: how many evaluations.
    """

    order = Order.MEASURE

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(self, trainer: "Trainer") -> None:
        self._stop_if_due(trainer)

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        if "validation_loss" in record:
            self._stop_if_due(trainer)

    def _stop_if_due(self, trainer: "Trainer") -> None:
        count = trainer.state.evaluations_since_best
        if count >= self.patience and trainer.stop_reason is None:
            since = counted(count, "evaluation")
            trainer.stop_reason = f"{since} without a new lowest validation loss (training.early_stopping_patience)"
