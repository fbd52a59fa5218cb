"""What a callback may do and when."""

from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class Order(IntEnum):
    """Who runs first at each point of the loop.

    Profilers come before evaluation, whose passes they should not see. What is measured comes before what writes it.
    Metrics come before checkpoints: a step that a checkpoint holds is never run again, so it must have been logged.
    """

    WATCH = 0
    MEASURE = 10
    CUSTOM = 20
    WRITE = 30
    SAVE = 40
    REPORT = 50


def is_logged(trainer: "Trainer", record: Mapping[str, float]) -> bool:
    """Whether the step that just ended is reported: every `logging.log_every`-th, first, last and evaluated ones."""
    step, config = trainer.state.step, trainer.config
    regular = step % config.logging.log_every == 0 or step in (1, config.training.max_steps)
    return regular or "validation_loss" in record


class Callback:
    """Called by the loop on every rank, by `order` and then as given. Override what you need."""

    order: ClassVar[Order] = Order.CUSTOM

    def on_train_begin(self, trainer: "Trainer") -> None:
        """After a resume, before the first step."""

    def on_step_begin(self, trainer: "Trainer") -> None:
        """Before each step; `trainer.state.step` of them are finished."""

    def on_step_end(self, trainer: "Trainer", record: dict[str, float]) -> None:
        """After each step. Numbers added to `record` are seen by later callbacks."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """After the last step, also when training was asked to stop early."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know: JSON values, the same on all ranks. Kept under the name of the class."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave; empty where the checkpoint has none."""
