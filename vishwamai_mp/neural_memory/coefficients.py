"""How a memory's decays and document starts add up inside a chunk, and the gradient of that.

Shapes: N chunks, E batch elements × heads, C tokens of a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """What a state or a write is worth later in its chunk.

    A matrix has a row per token t and a column c per origin: the state carried into the chunk (c = 0) or the write of
    token c − 1. Entries whose origin lies after t, or in another document, are zero.

    Attributes:
        forget: (N, E, C, C+1) products of α after the origin, up to and including t.
        momentum: the same of η; None without momentum.
        reach: (N, E, C, C+1) what the origin's S amounts to in M after token t. Without momentum `forget`.
        keep: (N, E, C, 1) 0 where a document begins; None where none does.
    """

    forget: Tensor
    momentum: Tensor | None
    reach: Tensor
    keep: Tensor | None

    def after(self) -> list[Tensor]:
        """What the carried M (and S) are worth in M after token t, each (N, E, C, 1)."""
        parts = [self.forget] if self.momentum is None else [self.forget, self.reach]
        return [part[..., :1] for part in parts]

    def before(self) -> list[Tensor]:
        """The same in M before token t: what token t's surprise is measured against."""
        return [self.delay(part, first) for part, first in zip(self.after(), (1.0, 0.0), strict=False)]

    def at_end(self) -> list[Tensor]:
        """What the chunk's writes are worth in M (and S) after the chunk, each (N, E, C, 1)."""
        parts = [self.forget] if self.momentum is None else [self.reach, self.momentum]
        return [part[..., -1, 1:, None] for part in parts]

    def delay(self, rows: Tensor, first: float = 0.0) -> Tensor:
        """`rows` (N, E, C, ·) one token later, `first` in the row that is free, zeros where a document begins."""
        delayed = torch.empty_like(rows, memory_format=torch.contiguous_format)
        delayed[:, :, 0] = first
        delayed[:, :, 1:] = rows[:, :, :-1]
        return delayed if self.keep is None else delayed.mul_(self.keep)

    def undelay(self, grad: Tensor) -> Tensor:
        """The gradient of `delay`'s input from that of its output."""
        out = torch.zeros_like(grad)
        later = grad[:, :, 1:] if self.keep is None else grad[:, :, 1:] * self.keep[:, :, 1:]
        out[:, :, :-1] = later
        return out


def coefficients(log_forget: Tensor, log_momentum: Tensor | None, starts: Tensor | None) -> Coefficients:
    """From ln α and ln η, (N, E, C), and where documents start, (N, E, C) bool or None."""
    hidden = _hidden(log_forget, starts)
    keep = None if starts is None else (~starts)[..., None].to(log_forget.dtype)
    forget = _products(log_forget, hidden)
    if log_momentum is None:
        return Coefficients(forget, None, forget, keep)
    momentum = _products(log_momentum, hidden)
    return Coefficients(forget, momentum, forget[..., 1:] @ momentum, keep)


def coefficients_backward(
    made: Coefficients, d_forget_carried: Tensor, d_momentum_last: Tensor | None, d_reach: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ln α and ln η, (N, E, C).

    Args:
        made: what `coefficients` returned.
        d_forget_carried: (N, E, C) gradient of `forget`'s first column.
        d_momentum_last: (N, E, C+1) gradient of `momentum`'s last row; None without momentum.
        d_reach: (N, E, C, C+1), consumed. Without momentum its first column is ignored.
    """
    if made.momentum is None:
        d_reach[..., 0] = d_forget_carried
        return _products_backward(d_reach, made.forget), None
    assert d_momentum_last is not None
    d_forget = torch.empty_like(d_reach)
    d_forget[..., 0] = d_forget_carried
    d_forget[..., 1:] = d_reach @ made.momentum.mT
    d_momentum = made.forget[..., 1:].mT @ d_reach
    d_momentum[:, :, -1] += d_momentum_last
    return _products_backward(d_forget, made.forget), _products_backward(d_momentum, made.momentum)


def _hidden(like: Tensor, starts: Tensor | None) -> Tensor:
    """True where token t has nothing of the origin in column c. (C, C+1), or (N, E, C, C+1) with documents."""
    length = like.shape[-1]
    future = torch.ones(length, length + 1, dtype=torch.bool, device=like.device).triu(2)
    if starts is None:
        return future
    begun = torch.nn.functional.pad(starts.cumsum(-1), (1, 0))  # documents begun before each origin's state was made
    return future | (begun[..., 1:, None] != begun[..., None, :])


def _products(logs: Tensor, hidden: Tensor) -> Tensor:
    # Sums in float64: the difference of two long sums must keep the small one between them.
    sums = torch.nn.functional.pad(logs.double().cumsum(-1), (1, 0))
    between = (sums[..., 1:, None] - sums[..., None, :]).to(logs.dtype)
    return between.masked_fill_(hidden, -torch.inf).exp_()


def _products_backward(grad: Tensor, products: Tensor) -> Tensor:
    grad = grad.mul_(products)
    d_sums = grad.sum(-1) - grad.sum(-2)[..., 1:]
    return d_sums.flip(-1).cumsum(-1).flip(-1)
