"""Reading the cache by the kernels of `reading_kernels.py`: which cases they take, and their launches.

Shapes: as in `read.py`.
"""

import math
from typing import TYPE_CHECKING, Any

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


class Reads:
    """The launches of one call, on the device of its tensors, which are contiguous: q (G, M, Q, K), and the latents."""

    def __init__(self, plan: "Everything | Chosen", q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> None:
        self.q, self.held = q, [keys, values, bias]
        self.groups, self.blocks, self.queries, self.width = q.shape
        self.segments, self.latents = bias.shape[1:]
        # A kernel reads either the first four or the last two; the others are there for their places.
        self.chosen = hasattr(plan, "own")
        nothing = q
        if self.chosen:
            self.plan = [
                *(_plain(getattr(plan, x)) for x in ("segments", "known", "own", "own_known")),
                nothing,
                nothing,
            ]
            self.looked = self.plan[0].shape[2]
        else:
            self.plan = [nothing] * 4 + [_plain(getattr(plan, x)) for x in ("since", "until")]
            self.looked = self.segments
        self.wide = power_of_two(self.width)
        self.tile = max(16, _NUMBERS // self.wide)
        self.query_tile = min(self.tile, 64, power_of_two(self.queries))
        self.latent_tile = min(self.tile, 64)

    def forward(self, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """As `read._Read`, and the logarithm of the softmax's denominator."""
        shape = self.q.shape[:3]
        samples = -(-self.queries // 16)
        out, null, lse = torch.empty_like(self.q), self._new(*shape), self._new(*shape)
        entropy = self._new(*shape[:2], samples)
        mass = None if real is None else self._new(self.groups, self.segments).zero_()
        counts = self.q if real is None else _plain(real)
        self._launch(
            "attend",
            self._query_grid(),
            [self.q, *self.held, *self.plan, counts],
            [out, null, entropy, lse, lse if mass is None else mass],
            samples,
            2 if mass is None else 3,
            MASS=mass is not None,
        )
        return out, null, entropy, mass, lse

    def backward(self, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, and in fp32 of keys, values and bias."""
        d_q, delta = torch.empty_like(self.q), torch.empty_like(lse)
        found = [torch.zeros_like(x, dtype=torch.float32) for x in self.held]
        grads = [d_q, delta, *found]
        self._launch(
            "queries_back", self._query_grid(), [self.q, *self.held, *self.plan, out, lse, d_out], grads, None, 3
        )
        tiles = -(-self.looked * self.latents // self.latent_tile)
        seen = [*self.plan[:2], *self.plan[4:]]
        inputs = [self.q, *self.held, *seen, lse, delta, d_out]
        self._launch("latents_back", (self.blocks * tiles, self.groups), inputs, found, None, 4)
        return d_q, *found

    def _query_grid(self) -> tuple[int, int]:
        return self.blocks * -(-self.queries // self.query_tile), self.groups

    def _launch(
        self,
        name: str,
        grid: tuple[int, int],
        inputs: list[Tensor],
        outputs: list[Tensor],
        samples: int | None,
        products: int,
        **constants: Any,
    ) -> None:
        sizes = [self.blocks, self.queries, self.segments, self.looked, self.latents, self.width]
        precision = "tf32x3" if self.q.dtype == torch.float32 else "tf32"
        tiles = {"QB": self.query_tile, "BC": self.latent_tile, "KP": self.wide, "CHOSEN": self.chosen}
        triton_kernels.run_kernel(
            "cache_augmentation.reading_kernels",
            name,
            grid,
            inputs,
            outputs,
            [*sizes, *([] if samples is None else [samples]), 1 / math.sqrt(self.width)],
            {**tiles, **constants, "PRECISION": precision},
            2 * products * self.groups * self.blocks * self.queries * self.looked * self.latents * self.width,
        )

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)


def _plain(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x
