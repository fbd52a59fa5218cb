"""Reading: attention over latents and a null slot, in memory that does not grow with their product.

A query attends to the latents of some segments and to the null slot, whose value is zero:

    w = softmax(q·k/√K + log σ(importance)),  o = Σ w v

The null slot is a segment like others, the first, of which one latent counts. Backward computes the weights again,
block by block, so what is kept is linear in tokens.

Shapes: G rows × heads (local), M blocks of Q queries, N segments of L latents (the null segment included), J segments
that a block looks at, K head width, C = J·L, or J·L + L with a segment of each query's own.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vishwamai_mp.cache_augmentation.reading_on_gpu import ReadOnGpu, supports
from vishwamai_mp.runtime import multiplies_natively
from vishwamai_mp.runtime.device import at_once

_BLOCK_SCORES = 2**19  # that a CPU computes at once where blocks look at few segments each: 2 MiB
SAMPLE = 16  # one query of so many has its entropy measured


class Latents(NamedTuple):
    """What the cache holds: keys and values (G, N, L, K), and log σ(importance) (G, N, L) in fp32 or fp64."""

    keys: Tensor
    values: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Everything:
    """Each block looks at all segments. Query i of a block may read a segment if since ≤ i < until.

    Attributes:
        since, until: (G, M, N).
        limits: for each block a number of segments behind which it can read none.
    """

    since: Tensor
    until: Tensor
    limits: tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """Each block looks at some segments, and each of its queries at one more.

    Attributes:
        segments: (G, M, J).
        known: (G, M, J) which of them count.
        own: (G, M, Q) another segment for each query.
        own_known: (G, M, Q) whether it counts: it does not where the block has it anyway.
    """

    segments: Tensor
    known: Tensor
    own: Tensor
    own_known: Tensor


class Reading(NamedTuple):
    """What came of a read: `out` (G, M, Q, K) and, without gradient, the measures.

    Attributes:
        null: (G, M, Q) weight of the null slot.
        entropy: (G, M, ⌈Q/16⌉) of the weights of some queries, nats.
        mass: (G, N) sum over queries of the weights on each segment; None where it was not asked for.
    """

    out: Tensor
    null: Tensor
    entropy: Tensor
    mass: Tensor | None


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which matrices of a dtype are multiplied: fp32 on CPUs without the hardware."""
    return dtype if dtype == torch.float64 or multiplies_natively(dtype) else torch.float32


def with_null(latents: Latents, null_GK: Tensor) -> Latents:
    """`latents` behind a segment whose first latent is the null slot; its others have no weight."""
    keys = F.pad(null_GK[:, None, None].to(latents.keys.dtype), (0, 0, 0, latents.keys.shape[2] - 1))
    bias = latents.bias.new_full(keys.shape[:3], -torch.inf)
    bias[..., 0] = 0
    heads = Latents(keys, torch.zeros_like(keys), bias)
    return Latents(*(torch.cat(pair, 1) for pair in zip(heads, latents, strict=True)))


def read(q_GMQK: Tensor, latents: Latents, plan: Everything | Chosen, real_GMQ: Tensor | None = None) -> Reading:
    """Attend from blocks of queries to segments, of which the first is the null segment: every query reads it.

    Args:
        q_GMQK: queries.
        latents: with the null segment.
        plan: who may read what.
        real_GMQ: which queries count in the mass; None: no mass is wanted.
    """
    way = ReadOnGpu if supports(q_GMQK, latents.keys, latents.values) else _Read
    return Reading(*way.apply(q_GMQK, *latents, plan, real_GMQ))


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, plan: Everything | Chosen, real: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        blocks = _Blocks(Latents(keys, values, bias), plan, q)
        out, null = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=bias.dtype)
        sampled = slice(None, None, SAMPLE)
        entropy = torch.empty_like(null[..., sampled])
        mass = None if real is None else bias.new_zeros(bias.shape[:2])
        for part in blocks.parts():
            some = blocks.take(part)
            weights = some.weights(q[:, part])
            out[:, part] = some.mix(weights).to(out.dtype)
            null[:, part] = weights[..., 0]
            entropy[:, part] = torch.special.entr(weights[..., sampled, :]).sum(-1)
            if mass is not None and real is not None:
                some.add_mass(mass, weights * real[:, part, :, None])
        ctx.save_for_backward(q, keys, values, bias)
        ctx.plan = plan
        ctx.mark_non_differentiable(null, entropy, *([] if mass is None else [mass]))
        return out, null, entropy, mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, *saved = ctx.saved_tensors
        blocks = _Blocks(Latents(*saved), ctx.plan, q)
        dq = torch.empty_like(q)
        found = Latents(*(torch.zeros_like(x, dtype=saved[2].dtype) for x in saved))
        for part in blocks.parts():
            some = blocks.take(part)
            dq[:, part] = some.backward(q[:, part], grads[0][:, part], found).to(dq.dtype)
        return dq, *(x.to(old.dtype) for x, old in zip(found, saved, strict=True)), None, None


class _Blocks:
    """Blocks of queries and the segments they look at, taken a few blocks at a time."""

    def __init__(self, latents: Latents, plan: Everything | Chosen, q_GMQK: Tensor) -> None:
        self.latents, self.plan, self.shape = latents, plan, q_GMQK.shape
        self.dtype = product_dtype(q_GMQK.dtype)

    def parts(self) -> list[slice]:
        """Slices of blocks: one block each where it looks at all segments, else as many as fit."""
        groups, blocks, queries, width = self.shape
        size = 1
        if isinstance(self.plan, Chosen):
            segments, latents = self.plan.segments.shape[2], groups * self.latents.bias.shape[2]
            scores = latents * queries * (segments + 1)
            largest = max(scores, latents * width * max(queries, segments))  # or the keys that are gathered
            size = max(1, at_once(self.latents.bias, _BLOCK_SCORES * largest // scores) // largest)
        return [slice(first, min(first + size, blocks)) for first in range(0, blocks, size)]

    def take(self, part: slice) -> "_Part":
        return (
            _AllPart(self, part, self.plan) if isinstance(self.plan, Everything) else _ChosenPart(self, part, self.plan)
        )


class _Part:
    """The arithmetic of some blocks. A subclass sets `keys`, `values` (G, m, C, K) and `bias`, broadcastable to the
    scores (G, m, Q, C), and says where results go."""

    keys: Tensor
    values: Tensor
    bias: Tensor

    def __init__(self, blocks: _Blocks) -> None:
        self.dtype, self.scale = blocks.dtype, 1 / math.sqrt(blocks.shape[-1])

    def weights(self, q: Tensor) -> Tensor:
        return self._scores(q.to(self.dtype) * self.scale).softmax(-1)

    def _scores(self, q: Tensor) -> Tensor:
        """q scaled, (G, m, Q, K) → (G, m, Q, C) in fp32 or fp64."""
        shape = (*q.shape[:3], self.keys.shape[2])
        if self.bias.dtype == self.dtype:
            bias = self.bias.expand(shape).flatten(0, 1)
            return torch.baddbmm(bias, q.flatten(0, 1), self.keys.flatten(0, 1).transpose(1, 2)).view(shape)
        return (q @ self.keys.transpose(-1, -2)).to(self.bias.dtype) + self.bias

    def mix(self, weights: Tensor) -> Tensor:
        return weights.to(self.dtype) @ self.values

    def backward(self, q: Tensor, d_out: Tensor, found: Latents) -> Tensor:
        """Add to the gradients of latents; returns that of q."""
        q, d_out = q.to(self.dtype), d_out.to(self.dtype)
        weights = self.weights(q)
        d_scores = self._softmax_backward(weights, (d_out @ self.values.transpose(-1, -2)).to(weights.dtype))
        scaled = (d_scores * self.scale).to(self.dtype)
        self._add(found.keys, scaled.transpose(-1, -2) @ q)
        self._add(found.values, weights.to(self.dtype).transpose(-1, -2) @ d_out)
        self._add(found.bias, d_scores.sum(-2))
        return scaled @ self.keys

    @staticmethod
    def _softmax_backward(weights: Tensor, d_weights: Tensor) -> Tensor:
        return torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)

    def add_mass(self, mass: Tensor, weights: Tensor) -> None:
        """Add what each segment was read to (G, N)."""
        raise NotImplementedError

    def _add(self, whole: Tensor, found: Tensor) -> None:
        """Add (G, m, J·L, …) to (G, N, L, …)."""
        raise NotImplementedError


class _AllPart(_Part):
    """One block that looks at all segments up to its limit."""

    def __init__(self, blocks: _Blocks, part: slice, plan: Everything) -> None:
        super().__init__(blocks)
        self.limit = plan.limits[part.start]
        keys, values, bias = (x[:, None, : self.limit].flatten(2, 3) for x in blocks.latents)
        self.keys, self.values = keys.to(self.dtype), values.to(self.dtype)
        place = torch.arange(blocks.shape[2], device=keys.device)[:, None]
        since, until = (x[:, part, None, : self.limit] for x in (plan.since, plan.until))
        hidden = (place < since) | (place >= until)
        self.bias = bias[..., None, :].masked_fill(
            hidden.repeat_interleave(blocks.latents.bias.shape[2], -1), -torch.inf
        )

    def add_mass(self, mass: Tensor, weights: Tensor) -> None:
        mass[:, : self.limit] += weights.sum((1, 2)).unflatten(-1, (self.limit, -1)).sum(-1)

    def _add(self, whole: Tensor, found: Tensor) -> None:
        whole[:, : self.limit] += found.sum(1).unflatten(1, (self.limit, -1))


class _ChosenPart(_Part):
    """Blocks that look at chosen segments, and a segment of each query's own."""

    def __init__(self, blocks: _Blocks, part: slice, plan: Chosen) -> None:
        super().__init__(blocks)
        groups, segments, latents = blocks.latents.bias.shape
        first = segments * torch.arange(groups, device=plan.own.device)[:, None, None]
        self.rows, self.own_rows = plan.segments[:, part] + first, plan.own[:, part] + first
        keys, values, bias = (_rows(x, self.rows).flatten(2, 3) for x in blocks.latents)
        self.keys, self.values = keys.to(self.dtype), values.to(self.dtype)
        unknown = ~plan.known[:, part].repeat_interleave(latents, -1)
        self.bias = bias.masked_fill(unknown, -torch.inf)[..., None, :]
        own_keys, own_values, own_bias = (_rows(x, self.own_rows) for x in blocks.latents)
        self.own_keys, self.own_values = own_keys.to(self.dtype), own_values.to(self.dtype)
        self.own_bias = own_bias.masked_fill(~plan.own_known[:, part, :, None], -torch.inf)
        self.shared = self.keys.shape[2]

    def _scores(self, q: Tensor) -> Tensor:
        own = (self.own_keys * q[..., None, :]).sum(-1).to(self.own_bias.dtype) + self.own_bias
        return torch.cat((super()._scores(q), own), -1)

    def mix(self, weights: Tensor) -> Tensor:
        shared, own = weights.to(self.dtype).split((self.shared, self.own_bias.shape[-1]), -1)
        return shared @ self.values + (own[..., None] * self.own_values).sum(-2)

    def backward(self, q: Tensor, d_out: Tensor, found: Latents) -> Tensor:
        q, d_out = q.to(self.dtype), d_out.to(self.dtype)
        weights = self.weights(q)
        sizes = (self.shared, self.own_bias.shape[-1])
        d_own = (self.own_values * d_out[..., None, :]).sum(-1)
        d_weights = torch.cat((d_out @ self.values.transpose(-1, -2), d_own), -1).to(weights.dtype)
        d_scores = self._softmax_backward(weights, d_weights)
        scaled, own_scaled = (d_scores * self.scale).to(self.dtype).split(sizes, -1)
        shared, own = weights.to(self.dtype).split(sizes, -1)
        self._add(found.keys, scaled.transpose(-1, -2) @ q)
        self._add(found.values, shared.transpose(-1, -2) @ d_out)
        self._add(found.bias, d_scores[..., : self.shared].sum(-2))
        self._add_own(found.keys, own_scaled[..., None] * q[..., None, :])
        self._add_own(found.values, own[..., None] * d_out[..., None, :])
        self._add_own(found.bias, d_scores[..., self.shared :])
        return scaled @ self.keys + (own_scaled[..., None] * self.own_keys).sum(-2)

    def add_mass(self, mass: Tensor, weights: Tensor) -> None:
        shared, own = weights.split((self.shared, self.own_bias.shape[-1]), -1)
        _add_rows(mass, self.rows, shared.sum(2).unflatten(-1, (self.rows.shape[2], -1)).sum(-1))
        _add_rows(mass, self.own_rows, own.sum(-1))

    def _add(self, whole: Tensor, found: Tensor) -> None:
        _add_rows(whole, self.rows, found)

    def _add_own(self, whole: Tensor, found: Tensor) -> None:
        _add_rows(whole, self.own_rows, found)


def _rows(whole: Tensor, rows: Tensor) -> Tensor:
    """(G, N, …) at rows of the first two dimensions made one."""
    flat = whole.flatten(0, 1)
    return flat.flatten(1).index_select(0, rows.flatten()).view(*rows.shape, *flat.shape[1:])


def _add_rows(whole: Tensor, rows: Tensor, found: Tensor) -> None:
    """The reverse: `found` holds the numbers of each row, in whatever shape."""
    size = whole[0, 0].numel()
    whole.view(-1, size).index_add_(0, rows.flatten(), found.reshape(-1, size).to(whole.dtype))
