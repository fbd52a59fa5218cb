"""`training.callbacks=[examples.extensions.stop_at_loss:StopAtLoss]`: ends training when the loss is low enough."""

from vishwamai_mp.training.callbacks import Callback
from vishwamai_mp.training.loop import Trainer


class StopAtLoss(Callback):
    """Ends training, with a checkpoint, after three steps in a row whose loss is low."""

    loss, patience = 0.05, 3

    def __init__(self) -> None:
        self.low = 0

    def on_step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        self.low = self.low + 1 if record["lm_loss"] < self.loss else 0
        record["low_steps"] = self.low  # written to metrics.jsonl
        if self.low == self.patience:  # equal on all ranks, so all stop after the same step
            trainer.stop_reason = f"the loss was below {self.loss} for {self.patience} steps"

    def state_dict(self) -> dict[str, int]:
        return {"low": self.low}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.low = state.get("low", 0)
