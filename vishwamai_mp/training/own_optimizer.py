"""Any `torch.optim.Optimizer` inside megatron-core's mixed precision, saved and loaded at any layout.

What it keeps per parameter has to be of the parameter's shape (or the number of its `step`), so that a checkpoint can
cut it anew for another layout. It sees this rank's shards of matrices; state that replicas share is for AdamW alone.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from vishwamai_mp.config import OptimizerConfig, UserError
from vishwamai_mp.config.extensions import find_extension


def use_own_optimizer(part: MegatronOptimizer, options: OptimizerConfig) -> None:
    """Put the user's optimizer in the place of the one that megatron-core made.

    Its groups are megatron-core's, of fp32 main parameters; `weight_decay` is set in each afterwards.

    Raises:
        ConfigError: there is no such class, or it is no optimizer.
        UserError: it does not take `optimizer.options`, or keeps what a checkpoint cannot hold.
    """
    kind = find_extension("optimizer.name", options.name, torch.optim.Optimizer)
    if part.optimizer is None:  # nothing is trained here
        return
    defaults = part.optimizer.defaults
    groups = [{key: value for key, value in group.items() if key not in defaults} for group in part.param_groups]
    try:
        part.optimizer = kind(groups, lr=options.learning_rate, **options.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.name={options.name} with optimizer.options={options.options}: {error}") from error
    _fill_state(part.optimizer)
    _check_state(part.optimizer, options.name)
    part.optimizer.state.clear()  # the first step makes it as it likes
    part.init_state_fn = _fill_state


@torch.no_grad()
def _fill_state(optimizer: torch.optim.Optimizer, _: Any = None) -> None:
    """Let an optimizer that has not stepped yet make its state: by a step without gradients, taken back."""
    if optimizer.state:
        return
    kept = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in _parameters(optimizer)]
    for parameter, before, _ in kept:
        parameter.grad = torch.zeros_like(before)
    optimizer.step()
    for parameter, before, gradient in kept:
        parameter.copy_(before)
        parameter.grad = gradient
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"] * 0


def _check_state(optimizer: torch.optim.Optimizer, name: str) -> None:
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            fits = isinstance(value, Tensor) and value.shape == parameter.shape
            if key != "step" and not fits:
                kind = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UserError(
                    f"optimizer.name={name}: its state {key!r} is {kind}, of a parameter of shape"
                    f" {list(parameter.shape)}; checkpoints hold state of the parameter's shape, and `step`"
                )


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
