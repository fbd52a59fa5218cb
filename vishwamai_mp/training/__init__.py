"""Optimizer, schedule, the training step, the loop and its callbacks."""

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)
