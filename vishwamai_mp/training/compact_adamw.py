"""AdamW whose moments take less of a GPU's memory: kept in bf16, in the host's memory, or both."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from vishwamai_mp.config import OptimizerConfig, UserError
from vishwamai_mp.runtime import is_accelerator, room_on_host, wait_for_device  # before megatron.core

# isort: split
import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")


class CompactAdamW(torch.optim.AdamW):
    """torch's AdamW, which widens the moments of one parameter at a time: to fp32, on the parameter's device.

    Both round to nearest what they keep, this class and Transformer Engine's kernel, which does the same in registers.

    Args:
        groups: of parameters, as torch has them.
        dtype: that moments are kept in.
        on_host: whether they are kept in the host's memory, which is pinned for the copies to and fro.
        options: of torch's AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype, on_host: bool, **options: Any) -> None:
        super().__init__(groups, **options)
        self.dtype, self.on_host = dtype, on_host

    def fill(self) -> None:
        """Give parameters without a state theirs: zeros."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    moments = {name: self._zeros(parameter) for name in MOMENTS}
                    self.state[parameter].update(moments, step=torch.zeros((), device=parameter.device))

    def _zeros(self, parameter: Tensor) -> Tensor:
        moves = self.on_host and is_accelerator(parameter)
        where = torch.device("cpu") if moves else parameter.device
        return torch.zeros(parameter.shape, dtype=self.dtype, device=where, pin_memory=moves and parameter.is_cuda)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have gradients."""
        assert closure is None
        self.fill()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        # In two steps: a copy that also converts would convert on the host, and wait.
        first, second = (state[name].to(parameter.device, non_blocking=True).float() for name in MOMENTS)
        assert parameter.grad is not None
        adamw(
            [parameter],
            [parameter.grad],
            [first],
            [second],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, moment in zip(MOMENTS, (first, second), strict=True):
            if state[name] is not moment:
                state[name].copy_(moment.to(self.dtype), non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, once the step's copies to the host have arrived."""
        if self.on_host:
            wait_for_device()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copied into the moments that are there: torch's would keep them in the parameter's type, on its device.

        megatron-core's distributed optimizer says the step in the groups where Transformer Engine is installed.
        """
        self.fill()
        saved = state_dict["param_groups"]
        places = chain.from_iterable(group["params"] for group in saved)
        for place, parameter in zip(places, chain.from_iterable(g["params"] for g in self.param_groups), strict=True):
            for name, value in state_dict["state"].get(place, {}).items():
                self.state[parameter][name].copy_(value)
        for group, other in zip(self.param_groups, saved, strict=True):
            group.update({name: value for name, value in other.items() if name not in ("params", "step")})
            for parameter in group["params"] if "step" in other else ():
                self.state[parameter]["step"].fill_(other["step"])


def is_compact(options: OptimizerConfig) -> bool:
    """Whether moments are kept otherwise than as megatron-core's choice of an optimizer keeps them."""
    return options.moments_in != "fp32" or options.moments_on_host


def use_compact_moments(part: MegatronOptimizer, options: OptimizerConfig) -> None:
    """Put an AdamW that keeps its moments as asked in the place of the one that megatron-core made.

    Transformer Engine's kernel reads and writes bf16 by itself, on the GPU.

    Raises:
        UserError: the host has no memory for them.
    """
    adam = part.optimizer
    if adam is None:  # nothing is trained here
        return
    groups = [{key: value for key, value in group.items() if key not in adam.defaults} for group in adam.param_groups]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.moments_in]
    need = 2 * dtype.itemsize * sum(rows.numel() for group in groups for rows in group["params"])
    if options.moments_on_host and need > room_on_host():
        raise UserError(
            f"optimizer.moments_on_host=true: {need / 2**30:.1f} GiB for each process of this machine, of which each"
            f" can have {room_on_host() / 2**30:.1f}; use more GPUs, optimizer.moments_in=bf16, or set it to false"
        )
    common: Any = {"lr": options.learning_rate, "betas": (options.beta1, options.beta2), "eps": options.epsilon}
    if hasattr(adam, "initialize_state") and not options.moments_on_host:
        part.optimizer = type(adam)([{"params": []}], exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype, **common)
    else:
        part.optimizer = CompactAdamW([{"params": []}], dtype, options.moments_on_host, **common)
    # Not given to the constructor, which refuses the stretches of parameters that the distributed optimizer has.
    part.optimizer.param_groups = [{**part.optimizer.defaults, **group} for group in groups]
    part.init_state_fn = fill_moments


def fill_moments(adam: Any, _: Any = None) -> None:
    """Give what has not stepped yet its state: zeros."""
    if isinstance(adam, CompactAdamW):
        adam.fill()
        return
    for group in adam.param_groups:
        for rows in group["params"]:
            if adam.state[rows]:
                continue
            if hasattr(adam, "initialize_state"):  # Transformer Engine's, which counts steps by group
                adam.initialize_state(rows, False)
                continue
            moments = {kind: torch.zeros_like(rows, requires_grad=False) for kind in MOMENTS}
            adam.state[rows].update(moments, step=torch.zeros((), device=rows.device))
