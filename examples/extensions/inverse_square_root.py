"""`schedule.decay=examples.extensions.inverse_square_root:rate`: falls as 1/√step (arXiv 1706.03762, section 5.3)."""

from vishwamai_mp.config import PretrainConfig


def rate(config: PretrainConfig, step: int) -> float:
    """Learning rate of a step after the warm-up, counted from 0; never below `optimizer.min_learning_rate`."""
    peak, low = config.optimizer.learning_rate, config.optimizer.min_learning_rate
    assert low is not None  # the configuration is resolved
    start = max(1, config.schedule.warmup_steps)
    return max(low, peak * (start / max(start, step + 1)) ** 0.5)
