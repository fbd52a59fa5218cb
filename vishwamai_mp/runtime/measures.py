"""What a module tells of a training step beside its output: measures for the log, and a loss of its own."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Measures:
    """Weighted means that a module adds up over the forward passes of a step, over ranks and over layers.

    A module with some, or with a loss of its own, keeps them as its attribute `measures`. Names that end in `_loss` are
    losses, weight included.

    Args:
        names: all names that will ever be added, equal in every module of a kind.

    Attributes:
        loss_scale: what the model's own loss is multiplied by before backward (fp16): a number, or a scalar tensor on
            the loss's device. The training step sets it.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.loss_scale: float | Tensor = 1.0
        self._sums: dict[tuple[str, ...], tuple[Tensor, list[float | Tensor]]] = {}
        self._tables: dict[tuple[str, ...], Tensor] = {}

    def add(self, name: str, total: Tensor, weight: float | Tensor) -> None:
        """Count `total`, a sum over `weight` items. Call it where gradients are on: recomputed layers run twice."""
        self.add_all([name], [total], [weight])

    def add_all(
        self, names: Sequence[str], totals: Sequence[Tensor] | Tensor, weights: Sequence[float | Tensor]
    ) -> None:
        """The same for several, which cost a device no more than one. Weights that are numbers cost it nothing."""
        assert set(names) <= set(self.names), f"{', '.join(names)} is not among {self.names}"
        together = totals if isinstance(totals, Tensor) else torch.stack(list(totals))
        entry, counts = together.detach().double(), list(weights)
        key = tuple(names)
        if key in self._sums:
            earlier, before = self._sums[key]
            entry, counts = earlier + entry, [old + new for old, new in zip(before, counts, strict=True)]
        self._sums[key] = entry, counts

    def add_table(self, names: Sequence[str], table: Tensor) -> None:
        """The same where the device knows the weights too: (2, names), totals and weights, in fp64."""
        key = tuple(names)
        assert set(names) <= set(self.names), f"{', '.join(names)} is not among {self.names}"
        self._tables[key] = self._tables[key] + table if key in self._tables else table

    def attach_loss(self, output: Tensor, loss: Tensor) -> Tensor:
        """Add a loss to the model's that only this module knows of.

        Args:
            output: what the module hands on.
            loss: scalar: its weight × the sum over this rank's tokens. The step divides gradients by its token count.
        """
        return _AttachedLoss.apply(output, loss, self.loss_scale)

    def take(self) -> dict[str, tuple[Tensor, float | Tensor]]:
        """(sum, weight) of each name since the last call."""
        sums: dict[tuple[str, ...], tuple[Tensor, Any]] = {**self._sums}
        self._sums, tables, self._tables = {}, self._tables, {}
        found: dict[str, tuple[Tensor, float | Tensor]] = {}
        for names, (totals, weights) in [*sums.items(), *((key, tuple(table)) for key, table in tables.items())]:
            for name, total, weight in zip(names, totals, weights, strict=True):
                earlier = found.get(name, (0.0, 0.0))
                found[name] = total + earlier[0], weight + earlier[1]
        return found


def measures_of(models: Iterable[nn.Module]) -> list[Measures]:
    """What the modules of `models` keep."""
    kept = (getattr(part, "measures", None) for model in models for part in model.modules())
    return [measures for measures in kept if isinstance(measures, Measures)]


def all_names(kept: Sequence[Measures]) -> list[str]:
    """The names of all ranks, in one order on all of them. A collective over the whole job."""
    own = {name for measures in kept for name in measures.names}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return sorted(set().union(*gathered))


def summed_measures(kept: Sequence[Measures], names: Sequence[str], device: torch.device) -> Tensor:
    """(sum, weight) of each of `names` over all ranks since the last call: (names, 2). A collective, unless empty."""
    table = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for measures in kept:
        for name, entry in measures.take().items():
            for place, found in zip(table[names.index(name)], entry, strict=True):
                place += found
    if names:
        dist.all_reduce(table)
    return table


def mean_measures(names: Sequence[str], table: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means from what `summed_measures` gave, read by the host; those with no weight are left out."""
    return {name: total / weight for name, (total, weight) in zip(names, table, strict=True) if weight}


class _AttachedLoss(torch.autograd.Function):
    """The identity on `output`; backward gives `loss` the gradient that the model's own loss has."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return gradient, (torch.ones_like(loss) * ctx.scale).to(loss.dtype), None
