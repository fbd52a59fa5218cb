"""Optimizer, schedule, the training step, the loop and its callbacks."""
