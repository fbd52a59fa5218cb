"""The learning rate as a function of the step: nothing to save, nothing to restore."""

import math

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.config.extensions import find_extension, is_own


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Learning rate of a step, counted from 0.

    Warm-up rises linearly and reaches the peak with its last step, so no step is wasted at zero; with
    `warmup_from_zero` it begins at zero and reaches the peak with the step after it. Then, until
    `decay_steps`: `cosine` or `linear` to the minimum; `wsd` (warm-up, stable, decay; arXiv 2404.06395) holds the peak
    and falls linearly over the last `wsd_decay_steps`; `constant` holds the peak. After `decay_steps`: the minimum.
    """
    schedule, peak, low = config.schedule, config.optimizer.learning_rate, config.optimizer.min_learning_rate
    assert schedule.decay_steps is not None
    assert schedule.wsd_decay_steps is not None
    assert low is not None
    if step < schedule.warmup_steps:
        return peak * (step + (not schedule.warmup_from_zero)) / schedule.warmup_steps
    if is_own(schedule.decay):
        return float(find_extension("schedule.decay", schedule.decay, 2)(config, step))
    if schedule.decay == "constant":
        return peak
    done = (step - schedule.warmup_steps) / max(1, schedule.decay_steps - schedule.warmup_steps)
    if schedule.decay == "wsd":
        done = (step - (schedule.decay_steps - schedule.wsd_decay_steps)) / schedule.wsd_decay_steps
    done = min(1.0, max(0.0, done))
    share = (1 + math.cos(math.pi * done)) / 2 if schedule.decay == "cosine" else 1 - done
    return low + (peak - low) * share
