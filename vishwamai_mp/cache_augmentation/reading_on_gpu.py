"""Reading the cache by the kernels of `reading_kernels.py`: which cases they take, and their launches.

Shapes: as in `read.py`.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vishwamai_mp.config.component_shapes import WIDEST_CACHE_HEAD
from vishwamai_mp.runtime import triton_kernels
from vishwamai_mp.runtime.triton_kernels import kernels_take, power_of_two

if TYPE_CHECKING:
    from vishwamai_mp.cache_augmentation.read import Chosen, Everything

_NUMBERS = 2**13  # of a tile of queries or latents


def supports(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernels compute this case; if not, torch's operators do, on any device.

    They take one dtype and heads up to 512 wide where kernels run at all; not where torch's deterministic algorithms
    are asked for: gradients of latents are added up in the order in which programs come to it.
    """
    return (
        kernels_take(q, keys, values)
        and q.dtype == keys.dtype == values.dtype
        and q.shape[-1] <= WIDEST_CACHE_HEAD
        and not torch.are_deterministic_algorithms_enabled()
    )


class ReadOnGpu(torch.autograd.Function):
    """`read._Read` by kernels: same arguments, results and gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        plan: "Everything | Chosen",
        real: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        saved = [x.contiguous() for x in (q, keys, values, bias)]
        out, null, entropy, mass, lse = Reads(plan, *saved).forward(real)
        ctx.save_for_backward(*saved, out, lse)
        ctx.plan = plan
        ctx.mark_non_differentiable(null, entropy, *([] if mass is None else [mass]))
        return out, null, entropy, mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, bias, out, lse = ctx.saved_tensors
        d_q, *found = Reads(ctx.plan, q, keys, values, bias).backward(out, lse, grads[0].contiguous())
        return d_q, *(x.to(old.dtype) for x, old in zip(found, (keys, values, bias), strict=True)), None, None


class Rows(NamedTuple):
    """Blocks of the tokens of rows, and what they may read: as `pooling_kernels.py` and `choosing_kernels.py` have it.

    Attributes:
        length: Q.
        since, until: (V, N).
        begins, counts: (V, M); None: every Q-th token begins a block.
        flags: (V, T); None likewise.
        segments, known: (G, M, J); None: all are looked at.
        own, own_known: (G, M, Q); None likewise.
    """

    length: int
    since: Tensor
    until: Tensor
    begins: Tensor | None
    counts: Tensor | None
    flags: Tensor | None
    segments: Tensor | None
    known: Tensor | None
    own: Tensor | None
    own_known: Tensor | None


class Reads:
    """The launches of one call, on the device of its tensors.

    Args:
        plan: who may read what.
        q: (G, M, Q, K), contiguous; with `Rows` (T, B, H, K), a slice of a contiguous projection.
        keys, values, bias: latents, contiguous.
    """

    def __init__(
        self, plan: "Everything | Chosen | Rows", q: Tensor, keys: Tensor, values: Tensor, bias: Tensor
    ) -> None:
        self.q, self.held = q, [keys, values, bias]
        self.width = q.shape[3]
        self.segments, self.latents = bias.shape[1:]
        self.rows = plan if isinstance(plan, Rows) else None
        if isinstance(plan, Rows):
            self.tokens, batch, heads, _ = q.shape
            self.groups, self.queries = batch * heads, plan.length
            self.blocks = -(-self.tokens // plan.length)
            self.per_row = self.groups // len(plan.since)
            strides = [q.stride(0), q.stride(2), self.groups * self.width, self.width]
        else:
            self.groups, self.blocks, self.queries, _ = q.shape
            self.tokens, self.per_row = self.blocks * self.queries, self.groups
            strides = 2 * [self.width, self.tokens * self.width]
        self.places = [self.tokens, self.per_row, *strides]
        # A kernel reads either the first four or the last two; the others are there for their places.
        self.chosen = getattr(plan, "own", None) is not None
        names = (("segments", "known", "own", "own_known"), ("since", "until"))
        wanted = (self.chosen, not self.chosen or self.rows is not None)
        self.plan = [
            _plain(getattr(plan, x)) if want else q for want, some in zip(wanted, names, strict=True) for x in some
        ]
        lists = (None, None, None) if self.rows is None else (self.rows.begins, self.rows.counts, self.rows.flags)
        self.listed = lists[0] is not None
        self.lists = [q if x is None else x for x in lists]
        self.looked = self.plan[0].shape[2] if self.chosen else self.segments
        self.wide = power_of_two(self.width)
        self.tile = max(16, _NUMBERS // self.wide)
        self.query_tile = min(self.tile, 64, power_of_two(self.queries))
        self.latent_tile = min(self.tile, 64)

    def forward(
        self, real: Tensor | None, counts: bool | None = None, capacity: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """As `read._Read`, and the logarithm of the softmax's denominator.

        With `Rows`, `out` is (T, B, H, K), and in place of the null slot's weight there are sums of measures and of
        their weights, (programs, 12); the entropy is to be ignored.

        Args:
            real: (G, M, Q) which queries count in the mass; None: all.
            counts: whether the mass is wanted; None: where `real` says which.
            capacity: segments that a cache holds: a weight of measures.
        """
        shape = (self.groups, self.blocks, self.queries)
        samples, grid = -(-self.queries // 16), self._query_grid()
        counts = real is not None if counts is None else counts
        out = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        lse = self._new(*shape)
        if self.rows is None:
            null, entropy, parts = self._new(*shape), self._new(*shape[:2], samples), lse
        else:
            null = parts = self._new(grid[0] * grid[1], 12)
            entropy = lse
        mass = self._new(self.groups, self.segments).zero_() if counts else None
        self._launch(
            "attend",
            grid,
            [self.q, *self.held, *self.plan, self.q if real is None else _plain(real), *self.lists],
            [out, null, entropy, lse, lse if mass is None else mass, parts],
            [samples],
            [capacity],
            2 if mass is None else 3,
            LP=power_of_two(self.latents, 1),
            MASS=mass is not None,
            REAL=real is not None,
        )
        return out, null, entropy, mass, lse

    def backward(
        self, out: Tensor, lse: Tensor, d_out: Tensor, d_projected: Tensor | None = None, pooled_until: int = 0
    ) -> tuple[Tensor, ...]:
        """Gradients of q, and in fp32 of keys, values and bias.

        Args:
            out, lse: as `forward` gave them.
            d_out: contiguous.
            d_projected: with `Rows`, where to put the gradient of q, the first features of each head, and zeros.
            pooled_until: tokens from there on are in no segment, where no flags say it.
        """
        d_q = torch.empty_like(self.q) if d_projected is None else d_projected
        delta = torch.empty_like(lse)
        sizes = [x.numel() for x in self.held]
        together = self._new(sum(sizes)).zero_()
        found = [x.view(old.shape) for x, old in zip(together.split(sizes), self.held, strict=True)]
        self._launch(
            "queries_back",
            self._query_grid(),
            [self.q, *self.held, *self.plan, *self.lists, out, lse, d_out],
            [d_q, delta, *found],
            [],
            [d_q.shape[-1], pooled_until],
            3,
        )
        tiles = -(-self.looked * self.latents // self.latent_tile)
        seen = [*self.plan[:2], *self.plan[4:], *self.lists[:2]]
        inputs = [self.q, *self.held, *seen, lse, delta, d_out]
        self._launch("latents_back", (self.blocks * tiles, self.groups), inputs, found, [], [], 4)
        return d_q, *found

    def _query_grid(self) -> tuple[int, int]:
        return self.blocks * -(-self.queries // self.query_tile), self.groups

    def _launch(
        self,
        name: str,
        grid: tuple[int, int],
        inputs: list[Tensor],
        outputs: list[Tensor],
        samples: list[int],
        more: list[int],
        products: int,
        **constants: Any,
    ) -> None:
        sizes = [self.blocks, self.queries, self.segments, self.looked, self.latents, self.width, *samples]
        precision = "tf32x3" if self.q.dtype == torch.float32 else "tf32"
        tiles = {"QB": self.query_tile, "BC": self.latent_tile, "KP": self.wide}
        kinds = {"CHOSEN": self.chosen, "ROWS": self.rows is not None, "LISTED": self.listed, "PRECISION": precision}
        triton_kernels.run_kernel(
            "cache_augmentation.reading_kernels",
            name,
            grid,
            inputs,
            outputs,
            [*sizes, 1 / math.sqrt(self.width), *self.places, *more],
            {**tiles, **constants, **kinds},
            2 * products * self.groups * self.blocks * self.queries * self.looked * self.latents * self.width,
        )

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)


def _plain(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x
