"""What FP8 or NVFP4 does to operands of each linear layer: how large they are, how scaled, how much is rounded away.

What a person looks at when FP8 training misbehaves. A share of underflow that grows says that small numbers (usually
gradients) fall out of the format; overflow says that a delayed scale lags behind.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.precision.formats import hybrid_format
from vishwamai_mp.precision.scaling import Operand


@dataclass
class OperandStatistics:
    """One operand of one linear layer, over the passes observed.

    Attributes:
        layer: the linear layer, numbered as in the whole model.
        operand: input, weight or gradient.
        amax: the largest absolute value.
        smallest_scale: of its scales, over passes and blocks.
        largest_scale: likewise.
        underflow: how many numbers became zero.
        overflow: how many were clipped to the end of the format's range.
        count: how many were not zero to begin with.
    """

    layer: str
    operand: str
    amax: float = 0.0
    smallest_scale: float = math.inf
    largest_scale: float = 0.0
    underflow: int = 0
    overflow: int = 0
    count: int = 0

    def add(self, x_MN: Tensor, rounded: Operand) -> None:
        """Take a pass's operand into account."""
        scales = rounded.scale if rounded.block_scales is None else rounded.block_scales
        assert scales is not None
        size = x_MN.float().abs()
        one_scale = rounded.block_scales is None  # blocks have scales of their own largest number: none is clipped
        clipped = size * scales > hybrid_format(self.operand).maximum if one_scale else size.isinf()
        other = OperandStatistics(
            self.layer,
            self.operand,
            amax=size.max().item(),
            smallest_scale=scales.min().item(),
            largest_scale=scales.max().item(),
            underflow=int(((rounded.values == 0) & (size != 0)).sum()),
            overflow=int(clipped.sum()),
            count=int((size != 0).sum()),
        )
        self.merge(other)

    def merge(self, other: "OperandStatistics") -> None:
        """Take another pass's or rank's numbers into account."""
        self.amax = max(self.amax, other.amax)
        self.smallest_scale = min(self.smallest_scale, other.smallest_scale)
        self.largest_scale = max(self.largest_scale, other.largest_scale)
        self.underflow += other.underflow
        self.overflow += other.overflow
        self.count += other.count

    def numbers(self) -> dict[str, float]:
        """What to show, with shares in place of counts."""
        count = max(self.count, 1)
        return {
            "amax": self.amax,
            "smallest_scale": self.smallest_scale,
            "largest_scale": self.largest_scale,
            "underflow": self.underflow / count,
            "overflow": self.overflow / count,
        }


class Fp8Statistics:
    """Collects statistics of the FP8 linear layers of this rank's model chunks, while it observes.

    Observing costs about as much again as the emulation itself.
    """

    def __init__(self, models: Sequence[Any]) -> None:
        self._linears = dict(named_fp8_linears(models))
        self._found: dict[tuple[str, str], OperandStatistics] = {}

    def observe(self, on: bool) -> None:
        """Start or stop."""
        for name, linear in self._linears.items():
            linear.fp8_observer = partial(self._add, name) if on else None

    def take(self) -> list[OperandStatistics]:
        """What all ranks together have seen since the last call, by layer. A collective over the whole job."""
        own, self._found = list(self._found.values()), {}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        merged: dict[tuple[str, str], OperandStatistics] = {}
        for statistics in (item for rank in ranks for item in rank):
            key = statistics.layer, statistics.operand
            if key in merged:
                merged[key].merge(statistics)
            else:
                merged[key] = statistics
        return sorted(merged.values(), key=lambda item: (int(item.layer.split(".")[1]), item.layer))

    def _add(self, layer: str, operand: str, x_MN: Tensor, rounded: Operand) -> None:
        key = layer, operand
        if key not in self._found:
            self._found[key] = OperandStatistics(layer, operand)
        self._found[key].add(x_MN.detach(), rounded)


def named_fp8_linears(models: Sequence[Any]) -> Iterable[tuple[str, Any]]:
    """The emulated FP8 linear layers of model chunks, as `layers.7.mlp.linear_fc1`, numbered from 0."""
    for model in models:
        for layer in model.decoder.layers:
            for name, module in layer.named_modules():
                if hasattr(module, "fp8_observer"):
                    yield f"layers.{layer.layer_number - 1}.{name}", module
