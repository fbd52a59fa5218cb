"""What a callback may do and when."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


def is_logged(trainer: "Trainer") -> bool:
    """Whether the step that just ended is reported: every `logging.log_every`-th, the first and the last."""
    step = trainer.state.step
    return step % trainer.config.logging.log_every == 0 or step in (1, trainer.config.training.max_steps)


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
