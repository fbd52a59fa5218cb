"""The whole cache between its two projections by kernels: segments, pooling, choice and reading of whole rows.

Shapes: as in `pooling_kernels.py`; N segments include the null segment.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vishwamai_mp.cache_augmentation import reading_on_gpu
from vishwamai_mp.cache_augmentation.read import Latents
from vishwamai_mp.cache_augmentation.reading_on_gpu import Reads, Rows
from vishwamai_mp.config.component_shapes import LONGEST_CACHE_SEGMENT, MOST_CACHE_LATENTS
from vishwamai_mp.runtime import triton_kernels
from vishwamai_mp.runtime.triton_kernels import power_of_two, sum_parts

_NUMBERS = 2**10  # of a tile of tokens
_PROGRAMS = 64  # of a row and head at most that pool backward: each leaves sums of gradients behind
_MOST_SEGMENTS = 2**13  # that a program chooses among
_ROW_TILE = 2048  # tokens at a time where a program looks through a row


class Parameters(NamedTuple):
    """The cache's own, of the heads at hand.

    Attributes:
        position_bias: (H, L, S).
        importance_weight: (H, E).
        importance_bias: (H,).
        null_key: (H, K).
    """

    position_bias: Tensor
    importance_weight: Tensor
    importance_bias: Tensor
    null_key: Tensor


class Augmented(NamedTuple):
    """What came of it.

    Attributes:
        read: (T, B, H, K).
        measures: (12,) sums of the measures that `cache_module.py` names, and then of their weights, fp64.
        mass: (G, N) weight that all tokens gave each segment; None where it was not asked for.
        latents: the null segment's and all written, without gradient.
    """

    read: Tensor
    measures: Tensor
    mass: Tensor | None
    latents: Latents


def supports(projected: Tensor, parameters: Parameters) -> bool:
    """Whether the kernels compute this case: where those that read do, and where a program holds a segment."""
    query = projected[..., : parameters.null_key.shape[1]]
    _, latents, length = parameters.position_bias.shape
    return (
        reading_on_gpu.supports(query, query, query)
        and len(projected) // length < _MOST_SEGMENTS
        and length <= LONGEST_CACHE_SEGMENT
        and latents <= MOST_CACHE_LATENTS
    )


def augment(
    projected: Tensor, parameters: Parameters, documents: Tensor | None, retrieve: int, capacity: int, counts: bool
) -> Augmented:
    """Write all segments of whole rows and read for each token.

    Args:
        projected: (T, B, H, 3·K + E + L), contiguous.
        parameters: see there.
        documents: (B, T), see `DifferentiableCacheAugmentation.forward`.
        retrieve: segments that a token may read before it has to choose.
        capacity: segments that the cache holds: a weight of measures.
        counts: whether the mass is wanted.
    """
    read, measures, mass, *latents = _Augment.apply(documents, retrieve, capacity, counts, projected, *parameters)
    return Augmented(read, measures, mass, Latents(*latents))


class _Augment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        documents: Tensor | None,
        retrieve: int,
        capacity: int,
        counts: bool,
        projected: Tensor,
        *own: Tensor,
    ) -> tuple[Tensor | None, ...]:
        call = Augmentation(projected, Parameters(*own))
        rows, latents = call.prepare(documents, retrieve)
        reads = Reads(rows, call.query, *latents)
        read, parts, _, mass, lse = reads.forward(None, counts, capacity)
        measures = parts.sum(0, dtype=torch.float64)
        ctx.save_for_backward(projected, *own, *latents, read, lse, *rows[1:])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in (measures, mass, *latents) if x is not None))
        return read, measures, mass, *latents

    @staticmethod
    def backward(ctx: Any, d_read: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        assert d_read is not None
        projected, *own = ctx.saved_tensors[:5]
        keys, values, bias, read, lse = ctx.saved_tensors[5:10]
        call = Augmentation(projected, Parameters(*own))
        plan = Rows(call.length, *ctx.saved_tensors[10:])
        d_projected, count = torch.empty_like(projected), bias.shape[1] - 1
        reads = Reads(plan, call.query, keys, values, bias)
        d_latents = reads.backward(read, lse, d_read.contiguous(), d_projected, count * call.length)[1:]
        return None, None, None, None, d_projected, *call.pool_back(plan, d_latents, d_projected)


class Augmentation:
    """The launches of one call but those of reading."""

    def __init__(self, projected: Tensor, own: Parameters) -> None:
        self.projected, self.own = projected, own
        self.tokens, self.batch, self.heads, self.features = projected.shape
        self.groups = self.batch * self.heads
        self.latents, self.length = own.position_bias.shape[1:]
        self.width, self.net = own.null_key.shape[1], own.importance_weight.shape[1]
        self.query = projected[..., : self.width]
        self.precision = "tf32x3" if projected.dtype == torch.float32 else "tf32"

    def prepare(self, documents: Tensor | None, retrieve: int) -> tuple[Rows, Latents]:
        """Who may read what, and what."""
        count = 1 + self.tokens // self.length
        rows = self._lay_out(documents, count)
        shape = (self.groups, count, self.latents, self.width)
        keys, values = self._like(*shape), self._like(*shape)
        bias, summaries, summary_bias = self._new(*shape[:3]), self._like(*shape[:2], self.width), self._new(*shape[:2])
        found = [keys, values, bias, summaries, summary_bias]
        self._pool("pool", (count, self.groups), rows, list(self.own), found, count)
        if count - 1 > retrieve:
            rows = self._choose(rows, summaries, summary_bias, retrieve)
        return rows, Latents(keys, values, bias)

    def pool_back(self, plan: Rows, d_latents: Sequence[Tensor], d_projected: Tensor) -> list[Tensor]:
        """The rest of `d_projected`; returns gradients of the parameters."""
        count = d_latents[0].shape[1]
        span = -(-count // _PROGRAMS)
        programs = -(-(count - 1) // span)
        parts = self._new(programs * self.batch, sum(x.numel() for x in self.own))
        grid = programs, self.groups
        self._pool("pool_back", grid, plan, [*self.own[:3], *d_latents], [d_projected, parts], count, span)
        pieces = sum_parts(parts, self.own.null_key.dtype).split([x.numel() for x in self.own])
        return [piece.view(x.shape) for piece, x in zip(pieces, self.own, strict=True)]

    def _lay_out(self, documents: Tensor | None, count: int) -> Rows:
        rows, blocks = 1 if documents is None else self.batch, -(-self.tokens // self.length)
        since, until = self._integers(rows, count), self._integers(rows, count)
        lists = [since] * 5
        if documents is not None:
            integers = [self._integers(rows, size) for size in (blocks, blocks, self.tokens, self.tokens)]
            flags = torch.empty(rows, self.tokens, dtype=torch.uint8, device=since.device)
            lists = [*integers[:2], flags, *integers[2:]]
        triton_kernels.run_kernel(
            "cache_augmentation.pooling_kernels",
            "lay_out",
            (rows,),
            [since if documents is None else documents.contiguous()],
            [since, until, *lists],
            [self.length, self.tokens, count, blocks],
            {"TB": min(_ROW_TILE, power_of_two(self.tokens)), "LISTED": documents is not None},
        )
        unlisted = Rows(self.length, since, until, None, None, None, None, None, None, None)
        return unlisted if documents is None else unlisted._replace(begins=lists[0], counts=lists[1], flags=lists[2])

    def _choose(self, rows: Rows, summaries: Tensor, summary_bias: Tensor, retrieve: int) -> Rows:
        count, blocks = summaries.shape[1], -(-self.tokens // self.length)
        first = self._new(self.groups, blocks, count)
        own = self._integers(self.groups, blocks, self.length)
        own_known = torch.empty(own.shape, dtype=torch.uint8, device=own.device)
        listed = self._integers(self.groups, blocks, 1 + retrieve)
        known = torch.empty(listed.shape, dtype=torch.uint8, device=own.device)
        per_row, is_listed = self.groups // len(rows.since), rows.begins is not None
        begins = rows.since if rows.begins is None else rows.begins
        tile = min(64, power_of_two(self.length))
        triton_kernels.run_kernel(
            "cache_augmentation.choosing_kernels",
            "compare",
            (blocks * -(-self.length // tile), self.groups),
            [self.query, summaries, summary_bias, rows.since, rows.until, begins],
            [first, own],
            [
                *(per_row, self.tokens, blocks, self.length, count, self.width),
                *(self.query.stride(0), self.query.stride(2), self.width**-0.5),
            ],
            {"QB": tile, "BC": 64, "KC": 64, "LISTED": is_listed, "PRECISION": self.precision},
            self.groups * self.tokens * count * self.width,  # of two that a multiply-add counts as: half are not seen
        )
        padded = power_of_two(count)
        triton_kernels.run_kernel(
            "cache_augmentation.choosing_kernels",
            "pick",
            (blocks, self.groups),
            [first, own, begins],
            [listed, known, own_known],
            [per_row, blocks, self.length, count, retrieve],
            {
                "NP": padded,
                "SHIFT": padded.bit_length() - 1,
                "RP": power_of_two(1 + retrieve),
                "QP": power_of_two(self.length),
                "LISTED": is_listed,
            },
            warps=4,
        )
        return rows._replace(segments=listed, known=known, own=own, own_known=own_known)

    def _pool(
        self,
        name: str,
        grid: tuple[int, int],
        rows: Rows,
        inputs: list[Tensor],
        outputs: list[Tensor],
        count: int,
        *span: int,
    ) -> None:
        padded, per_row = power_of_two(self.length), self.groups // len(rows.since)
        content = 2 * self.groups * count * self.latents * self.length * (2 * self.width + self.net)
        triton_kernels.run_kernel(
            "cache_augmentation.pooling_kernels",
            name,
            grid,
            [self.projected, rows.since, rows.until, *inputs],
            outputs,
            [
                *(self.groups, self.heads, per_row, self.features, count, self.latents, self.length, self.width),
                *span,
            ],
            {
                "LP": power_of_two(self.latents),
                "SP": padded,
                "CB": max(16, min(64, _NUMBERS // padded, power_of_two(self.width))),
                "E": self.net,
                "EP": power_of_two(self.net),
                "PRECISION": self.precision,
            },
            content if name == "pool" else 2 * content,
        )

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.projected.device)

    def _like(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.projected.dtype, device=self.projected.device)

    def _integers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.projected.device)
