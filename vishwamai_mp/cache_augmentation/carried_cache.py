"""Training on segments of one long document that arrive in the same row, micro-batch after micro-batch.

Shapes: B rows, H heads (local), G = B·H, n carried segments of L latents, N segments of this row, T tokens of a row.
"""

from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from vishwamai_mp.cache_augmentation.eviction import survivors, take, worth
from vishwamai_mp.cache_augmentation.read import Latents
from vishwamai_mp.cache_augmentation.segments import Segments


class Carried(NamedTuple):
    """Latents of earlier rows, without gradient; log σ of −∞ marks what is none. `access`: (G, n)."""

    latents: Latents
    access: Tensor


class CarriedCache:
    """What the rows of the last micro-batch left behind.

    Where layers are recomputed in backward, a pass must find again what its first run found, though other micro-batches
    ran in between: that waits here in a queue.

    Args:
        megatron: megatron-core's configuration.
        capacity: segments that are kept of each head.
    """

    def __init__(self, megatron: TransformerConfig, capacity: int) -> None:
        self._recomputes = megatron.recompute_granularity == "full"
        self._capacity = capacity
        self._kept: Carried | None = None
        self._awaiting: deque[Carried | None] = deque()
        self._again = False  # whether this pass is a layer's second, in backward

    def reset(self) -> None:
        """Forget all."""
        self._kept = None
        self._awaiting.clear()

    def fill(self, like: Tensor) -> Tensor:
        """Segments held, averaged over rows and heads: a scalar on the device of `like`."""
        if self._kept is None:
            return like.new_zeros((), dtype=torch.float64)
        return (self._kept.latents.bias[..., 0] > -torch.inf).sum(1).double().mean()

    def before(self, groups: int) -> Carried | None:
        """What this pass finds; None: nothing, or of another number of rows."""
        # First passes of recomputed layers run without gradients; of the other layers none is queued.
        self._again = torch.is_grad_enabled() and bool(self._awaiting)
        if self._again:
            return self._awaiting.popleft()
        kept = self._kept if self._kept is not None and self._kept.access.shape[0] == groups else None
        if self._recomputes and not torch.is_grad_enabled():
            self._awaiting.append(kept)
        return kept

    @torch.no_grad()
    def keep(
        self, before: Carried | None, latents: Latents, mass: Tensor, belongs_GN: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        """Keep what the next rows may read.

        Args:
            before: what this pass found.
            latents: that and this row's, (G, n + N, …).
            mass: (G, n + N) weights that this rank's queries gave.
            belongs_GN: (G, n + N) which are of the document that the row ends in.
            group: context parallel ranks, which read different tokens and must keep the same.

        Returns:
            segments that were evicted, over all groups.
        """
        if self._again:
            return mass.new_zeros(())
        access = mass.clone()
        if group.size() > 1:
            dist.all_reduce(access, group=group)
        if before is not None:
            access[:, : before.access.shape[1]] += before.access
        # After a step that was skipped for its NaNs, nothing of it stays.
        sound = belongs_GN & torch.stack([x.isfinite().flatten(2).all(-1) for x in latents]).all(0)
        bias = latents.bias.masked_fill(~sound[..., None], -torch.inf)
        held = sound.sum(1)
        # As many as there may be: how many there are, a GPU's host would wait to know. What is too much has no bias.
        stay = survivors(worth(bias, access), min(self._capacity, sound.shape[1]))
        keys, values = (take(x, stay).detach() for x in (latents.keys, latents.values))
        finite = take(sound, stay)[..., None, None]
        keys, values = (x.masked_fill(~finite, 0) for x in (keys, values))
        self._kept = Carried(Latents(keys, values, take(bias, stay).detach()), take(access, stay))
        return (held - self._capacity).clamp(min=0).sum()


def belonging(segments: Segments, tokens: int, carried_until: Tensor | None, carried: int) -> Tensor:
    """(B, n + N) which segments are of the document that each row ends in."""
    own = segments.until == tokens
    if carried_until is None:
        return own
    before = (carried_until == tokens)[:, None].expand(-1, carried)
    return torch.cat((before, own.expand(before.shape[0], -1)), 1)
