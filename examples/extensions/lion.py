"""`optimizer.name=examples.extensions.lion:Lion`: sign momentum (Lion, arXiv 2302.06675), half of AdamW's state.

A learning rate three to ten times below AdamW's, and a weight decay as many times above, are where to begin (section 5
of the paper).
"""

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """θ ← θ − lr · (sign(β₁m + (1 − β₁)g) + λθ), then m ← β₂m + (1 − β₂)g.

    Args:
        groups: of fp32 parameters.
        lr: learning rate.
        betas: β₁ and β₂.
        weight_decay: λ; `optimizer.weight_decay` replaces it, 0 for vectors.
    """

    def __init__(
        self, groups: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                direction = torch.lerp(gradient, state["momentum"], beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                state["momentum"].lerp_(gradient, 1 - beta2)
