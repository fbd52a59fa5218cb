"""What a callback may do and when."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


def is_logged(trainer: "Trainer", record: Mapping[str, float]) -> bool:
    """Whether the step that just ended is reported: every `logging.log_every`-th, first, last and evaluated ones."""
    step, config = trainer.state.step, trainer.config
    regular = step % config.logging.log_every == 0 or step in (1, config.training.max_steps)
    return regular or "validation_loss" in record


class Callback:
    """Called by the loop on every rank, in the order given. Override what you need."""

    def on_train_begin(self, trainer: "Trainer") -> None:
        """After a resume, before the first step."""

    def on_step_begin(self, trainer: "Trainer") -> None:
        """Before each step; `trainer.state.step` of them are finished."""

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        """After each step. Numbers added to `record` are seen by later callbacks."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """After the last step, also when training was asked to stop early."""
