"""Goes back, at the end of training, to the weights that had the lowest validation loss."""

from typing import TYPE_CHECKING

from vishwamai_mp.checkpoint.store import name_of
from vishwamai_mp.training.callbacks.base import Callback, Order

if TYPE_CHECKING:
    from vishwamai_mp.training.loop import Trainer


class BestModel(Callback):
    """Loads the best checkpoint's weights. Comes after `Checkpointing`, which saves it and finishes what it writes.

    The newest checkpoint stays the last step's: a resumed run goes on from there.
    """

    order = Order.SAVE

    def on_train_end(self, trainer: "Trainer") -> None:
        best = trainer.state.best_step
        if best is None or best == trainer.state.step:
            return
        path = trainer.checkpoints.root / name_of(best)
        trainer.checkpoints.load(path, trainer.chunks, trainer.optimizer, weights_only=True)
        trainer.say(f"loaded the best model: {path.name}, validation loss {trainer.state.best_loss:.4f}")
