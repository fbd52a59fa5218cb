"""Delayed scaling: an operand's scale follows from the largest values that it had in earlier passes.

Shapes: H history length, L linear layers of this model chunk.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vishwamai_mp.config.resolve_fp8 import SCALING_STATE
from vishwamai_mp.precision.formats import hybrid_format
from vishwamai_mp.precision.scaling import largest_absolute
from vishwamai_mp.runtime import device

ROLES = ("input", "weight", "gradient")
_FORWARD, _BACKWARD = slice(0, 2), slice(2, 3)


def update_scales_(history: Tensor, scale: Tensor, maximum: float, algorithm: str) -> None:
    """Take a pass's amaxes, in row 0 of the history, into the scales, in place; row 0 is zero afterwards.

    Transformer Engine's rule: a scale without a usable amax (zero, infinite, NaN) stays as it was.

    Args:
        history: amaxes of N operands, (…, H, N).
        scale: theirs, (…, N).
        maximum: the format's.
        algorithm: "max" over the history, or "most_recent".
    """
    amax = history.amax(-2) if algorithm == "max" else history[..., 0, :].clone()
    new = torch.div(amax.new_full((), maximum), amax)  # a tensor, so that the division is one: see scale_from_amax
    new = torch.where(torch.isinf(new), torch.finfo(torch.float32).max, new)
    scale.copy_(torch.where((amax > 0) & torch.isfinite(amax), new, scale))
    history.copy_(history.roll(-1, -2))
    history[..., 0, :].zero_()


class DelayedScaling:
    """Scales and histories of all FP8 linear layers of one model chunk.

    After each forward pass of the decoder in training, the pass's amaxes of inputs and weights are reduced (MAX) over
    `group` and the scales updated; after each backward pass those of gradients. Activations that are recomputed in a
    backward pass are scaled as they were in their forward pass, and do not count twice. Evaluation changes nothing.

    Every layer gets its part as buffers, `SCALING_STATE`, (H, 3) and (3,) in the order of `ROLES`: part of
    checkpoints, and equal on all ranks of the group.

    Args:
        decoder: the module whose passes count.
        layers: its FP8 linear layers, L of them.
        group: ranks that hold shards or replicas of these layers: tensor × data × context parallel.
        history_length: H.
        algorithm: as `update_scales_` has it.
    """

    def __init__(
        self, decoder: nn.Module, layers: Sequence[nn.Module], group: Any, history_length: int, algorithm: str
    ) -> None:
        self.group, self.algorithm = group, algorithm
        self.history = torch.zeros(len(layers), history_length, len(ROLES), device=device())
        self.scale = torch.ones(len(layers), len(ROLES), device=device())
        self._in_use = self.scale  # of the pass that is being run
        self._forward = self._backward = False  # inside a pass that counts
        for index, layer in enumerate(layers):
            for name, state in zip(SCALING_STATE, (self.history, self.scale), strict=True):
                layer.register_buffer(name, state[index])
        decoder.register_forward_pre_hook(self._begin_forward)
        decoder.register_forward_hook(self._end_forward)

    def scale_of(self, index: int, role: str, x: Tensor) -> Tensor:
        """The scale of an operand `x` in the current pass; notes its amax for later ones."""
        place = ROLES.index(role)
        if self._backward if role == "gradient" else self._forward:
            noted = self.history[index, 0, place]
            noted.copy_(torch.maximum(noted, largest_absolute(x).float()))
        return self._in_use[index, place]

    def _begin_forward(self, decoder: nn.Module, _: Any) -> None:
        self._forward = decoder.training

    def _end_forward(self, decoder: nn.Module, _: Any, output: Tensor) -> None:
        if not self._forward:
            return
        self._forward = False
        before = self.scale.clone()
        self._update(_FORWARD)
        if output.requires_grad:
            output.register_hook(lambda _: self._begin_backward(before))

    def _begin_backward(self, scale: Tensor) -> None:
        self._backward = True
        self._in_use = torch.cat((scale[:, _FORWARD], self.scale[:, _BACKWARD]), 1)
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._backward, self._in_use = False, self.scale
        self._update(_BACKWARD)

    def _update(self, roles: slice) -> None:
        history, scale = self.history[..., roles], self.scale[:, roles]
        if self.group.size() > 1:
            amax = history[:, 0].clone(memory_format=torch.contiguous_format)
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.group)
            history[:, 0] = amax
        update_scales_(history, scale, hybrid_format(ROLES[roles][0]).maximum, self.algorithm)
