"""Watches the loss: which steps may update the model, and when to give up."""

import math
from collections.abc import Sequence

import torch.distributed as dist

from vishwamai_mp.config import TrainingConfig, UserError
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.batches import Batch
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.training.step import StepResult, TrainStep

_SMOOTHING = 0.95  # of the running mean that a spike is measured against
_SETTLE_STEPS = 20  # steps before spikes are looked for: an early loss falls fast


class LossGuard:
    """Skips steps with a non-finite or spiking loss and gives up after too many in a row.

    Every rank holds one and all decide alike, from numbers that are equal on all ranks. Its state is two numbers and
    a count, saved with the checkpoint.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.mean_loss = math.nan
        self.seen = 0
        self.skipped_in_a_row = 0

    def state_dict(self) -> dict[str, float | None]:
        mean = None if math.isnan(self.mean_loss) else self.mean_loss
        return {"mean_loss": mean, "seen": self.seen, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        mean = state["mean_loss"]
        self.mean_loss = math.nan if mean is None else mean
        self.seen = int(state["seen"] or 0)
        self.skipped_in_a_row = int(state["skipped_in_a_row"] or 0)

    @property
    def limit(self) -> float:
        """The loss above which the coming step is not to update the model."""
        if self.config.spike_factor is None or self.seen < _SETTLE_STEPS:
            return math.inf
        return self.config.spike_factor * self.mean_loss

    def observe(self, result: StepResult) -> None:
        """Take note of a step.

        Raises:
            UserError: more than `training.max_skipped_steps` skipped in a row.
        """
        if result.updated:
            self.skipped_in_a_row = 0
            self.seen += 1
            old = self.mean_loss if self.seen > 1 else result.lm_loss
            self.mean_loss = _SMOOTHING * old + (1 - _SMOOTHING) * result.lm_loss
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.config.max_skipped_steps:
            raise UserError(
                f"{counted(self.skipped_in_a_row, 'step')} in a row could not be used (loss {result.lm_loss:.4g},"
                f" gradient norm {result.grad_norm:.4g}); lower optimizer.learning_rate, lengthen"
                " schedule.warmup_steps or look at the data; training.max_skipped_steps sets the patience"
            )


def explain(result: StepResult, limit: float, steps: TrainStep, batches: Sequence[Batch], step: int) -> str:
    """Why a step was skipped and, where its gradients are not finite, which ranks began it. Every rank must call it.

    Args:
        result: of the skipped step.
        limit: on its loss.
        steps: what ran it.
        batches: its micro-batches on this rank.
        step: its number.
    """
    reason = f"loss {result.lm_loss:.4g}, gradient norm {result.grad_norm:.4g}"
    if not math.isfinite(result.lm_loss):
        return f"{reason}; {_blame(steps, batches, step)}"
    if math.isfinite(result.grad_norm):
        return f"{reason}; the loss is above training.spike_factor's limit of {limit:.4g}"
    if PrecisionPolicy.of_run(steps.config).scales_loss:  # an overflow is how fp16 finds its loss scale
        return f"{reason}; the loss scale is lowered to {float(steps.optimizer.get_loss_scale()):.6g}"
    return f"{reason}; {_blame(steps, batches, step)}"


def _blame(steps: TrainStep, batches: Sequence[Batch], step: int) -> str:
    finite = steps.own_gradients_are_finite(batches, step)
    reports: list[str | None] = [None] * steps.runtime.world_size
    dist.all_gather_object(reports, None if finite else steps.runtime.describe())
    ranks = [report for report in reports if report]
    if ranks:
        return "non-finite gradients on " + "; ".join(ranks)
    return "computed again, the gradients are finite on all ranks: faulty hardware, or a defect"
