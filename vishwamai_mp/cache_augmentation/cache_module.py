"""The cache inside a layer: x + retrieval_factor · W_o(read), identity at initialisation.

Shapes: S tokens of this rank (after sequence and context parallelism), T tokens of whole rows, C tokens on this context
parallel rank, B rows, D width, H heads (local), K head width, L latents per segment, N segments, E importance width.
"""

from collections.abc import Iterable
from functools import reduce

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from vishwamai_mp.cache_augmentation.cache_on_gpu import Parameters, augment, supports
from vishwamai_mp.cache_augmentation.cache_state import CacheState, Decoder
from vishwamai_mp.cache_augmentation.carried_cache import CarriedCache, belonging
from vishwamai_mp.cache_augmentation.chunk_reading import ChunkReading, Reader
from vishwamai_mp.cache_augmentation.pooled_latents import chunk_starts, gather_pooled
from vishwamai_mp.cache_augmentation.read import Latents, with_null
from vishwamai_mp.cache_augmentation.segments import Segments, locate
from vishwamai_mp.cache_augmentation.write import Widths, initial_positions, latents_of, pool_whole_rows
from vishwamai_mp.components.head_sharded import HeadShardedModule, Linears
from vishwamai_mp.components.standalone import Standalone, alone
from vishwamai_mp.config import CacheConfig
from vishwamai_mp.config.component_shapes import IMPORTANCE_WIDTH, cache_heads
from vishwamai_mp.runtime.measures import Measures

_MEASURES = (
    "cache_entropy",  # of a token's weights over latents and null slot, nats
    "cache_null_share",
    "cache_importance",  # mean of σ, and of its square: their difference says how it is spread
    "cache_importance_square",
    "cache_fill",  # segments held / capacity
    "cache_evictions",  # segments per head and row
)


class DifferentiableCacheAugmentation(Standalone, HeadShardedModule):
    """Latents of past segments, written by learned pooling and read by attention with importance and a null slot.

    Args:
        config: resolved. Alone, outside a model, the component stands for itself, in one process and in fp32.
        megatron: megatron-core's configuration.
        groups: process groups; heads are split over `tp`, tokens over `cp`.
        layer_number: from 1.
        linears: classes of the backend.
    """

    section = "cache"

    def __init__(
        self,
        config: CacheConfig,
        megatron: TransformerConfig | None = None,
        groups: ProcessGroupCollection | None = None,
        layer_number: int = 1,
        *,
        linears: Linears | None = None,
    ) -> None:
        if megatron is None or groups is None or linears is None:
            config, megatron, groups, linears = alone(self.section, config)
        assert config.hidden_size is not None
        width, heads = config.hidden_size, cache_heads(config)
        widths = Widths(width // heads, IMPORTANCE_WIDTH, config.latents_per_segment)
        super().__init__(
            megatron,
            groups,
            layer_number,
            linears,
            width=width,
            heads=heads,
            features=widths.total,
            read_width=width,
        )
        self.cache_config, self.widths = config, widths
        self.position_bias = self.of_heads(initial_positions(config.latents_per_segment, config.segment_length))
        self.importance_weight = self.of_heads(torch.full((IMPORTANCE_WIDTH,), 1 / IMPORTANCE_WIDTH))
        self.importance_bias = self.of_heads(torch.zeros(1))
        self.null_key = self.of_heads(torch.zeros(self.widths.head))
        self.measures = Measures(*_MEASURES)
        capacity = config.max_cache_length // config.latents_per_segment
        self.carried = CarriedCache(megatron, capacity) if config.carry_state else None

    def forward(
        self, hidden: Tensor, documents: Tensor | None = None, state: CacheState | None = None
    ) -> tuple[Tensor, CacheState | None]:
        """Add what the cache holds for each token.

        Args:
            hidden: (S, B, D).
            documents: (B, T) ids of whole rows, constant inside a document and different between neighbours; None:
                each row is one document. With `carry_state`, 0 in a row's first place says that it goes on where the
                last row of its place in the batch ended.
            state: decoding: what `forward` returned for the tokens before.

        Returns:
            (S, B, D) and, in evaluation of whole rows of one document, the state after these tokens.
        """
        normed, hidden = self.normed(hidden)
        projected, _ = self.projection(normed)
        projected = projected.unflatten(-1, (self.heads, self.widths.total))
        query, content, scores = self.widths.split(projected)
        alone = not self.training and documents is None and self.groups.cp.size() == 1
        if state is None and not (alone and query.shape[0] < self.cache_config.segment_length):
            by_kernels = self.groups.cp.size() == 1 and not (self.carried is not None and self.training)
            if by_kernels and supports(projected, self._own()):
                read, after = self._augment(projected, documents, alone)
            else:
                read, after = self._read_rows(query, content, scores, documents, alone)
        else:
            assert alone, "a state continues single documents, in evaluation"
            state = state or self._decoder().empty(query, content, scores)
            read, after = self._decoder().advance(query, content, scores, state)
        out, _ = self.output(read.flatten(-2))
        out = F.dropout(out, self.cache_config.dropout, self.training)
        return torch.add(hidden, out, alpha=self.cache_config.retrieval_factor), after

    def _augment(self, projected: Tensor, documents: Tensor | None, alone: bool) -> tuple[Tensor, CacheState | None]:
        """`_read_rows` by kernels."""
        config = self.cache_config
        capacity = config.max_cache_length // self.widths.latents
        found = augment(projected, self._own(), documents, config.retrieve_segments, capacity, alone)
        if self.training and torch.is_grad_enabled():
            self.measures.add_table(_MEASURES, found.measures.view(2, -1))
        if not alone:
            return found.read, None
        assert found.mass is not None
        return found.read, self._decoder().start(found.latents, found.mass, *self.widths.split(projected))

    def _own(self) -> Parameters:
        return Parameters(self._position_bias(), *self._importance(), self.null_key.view(self.heads, -1))

    def _read_rows(
        self, query: Tensor, content: Tensor, scores: Tensor, documents: Tensor | None, alone: bool
    ) -> tuple[Tensor, CacheState | None]:
        """Write and read whole rows: (C, B, H, ·) → (C, B, H, K)."""
        tokens, rows = query.shape[0] * self.groups.cp.size(), query.shape[1]
        segments = locate(self.cache_config.segment_length, tokens, documents, query.device)
        written = latents_of(self._pool(content, scores, segments), *self._importance(), self.widths.head)
        carrying = self.carried if self.training else None
        before, until = None, None
        if carrying is not None:
            before = carrying.before(rows * self.heads)
            until = _carried_until(documents, tokens, rows, query.device) if before else None
        latents = written if before is None else Latents(*map(_behind, before.latents, written))
        held = with_null(latents, self.null_key.view(self.heads, -1).repeat(rows, 1))
        reader = Reader(
            segments, held, self.cache_config.retrieve_segments, until, counts=alone or carrying is not None
        )
        starts = chunk_starts(query.shape[0], self.groups.cp)
        found = [reader(part, start) for part, start in zip(query.chunk(len(starts)), starts, strict=True)]
        masses = [part.mass for part in found if part.mass is not None]
        mass = torch.stack(masses).sum(0) if masses else written.bias.new_zeros(0)
        evicted = written.bias.new_zeros(())
        if carrying is not None:
            belongs = belonging(segments, tokens, until, latents.bias.shape[1] - written.bias.shape[1])
            belongs = belongs.repeat_interleave(mass.shape[0] // belongs.shape[0], 0)
            evicted = carrying.keep(before, latents, mass[:, 1:], belongs, self.groups.cp)
        if self.training and torch.is_grad_enabled():
            self._measure(found, written.bias, segments, evicted)
        read = torch.cat([part.out for part in found])
        return read, self._decoder().start(held, mass, query, content, scores) if alone else None

    def reset_cache(self) -> None:
        """Forget what is carried from micro-batch to micro-batch (`carry_state`)."""
        if self.carried is not None:
            self.carried.reset()

    def _decoder(self) -> Decoder:
        return Decoder(
            self.cache_config, self._position_bias(), *self._importance(), self.null_key.view(self.heads, -1)
        )

    def _position_bias(self) -> Tensor:
        return self.position_bias.view(self.heads, self.widths.latents, -1)

    def _importance(self) -> tuple[Tensor, Tensor]:
        return self.importance_weight.view(self.heads, -1), self.importance_bias

    def _pool(self, content: Tensor, scores: Tensor, segments: Segments) -> Tensor:
        if self.groups.cp.size() == 1:
            return pool_whole_rows(content, scores, self._position_bias(), segments)
        return gather_pooled(content, scores, self._position_bias(), segments, self.groups.cp)

    @torch.no_grad()
    def _measure(self, found: list[ChunkReading], bias_GNL: Tensor, segments: Segments, evicted: Tensor) -> None:
        rows = bias_GNL.shape[0] // self.heads
        written = (segments.until > 0).expand(rows, -1).repeat_interleave(self.heads, 0)[..., None]
        importance, count = bias_GNL.exp() * written, written.sum() * bias_GNL.shape[2]
        held = self.carried.fill(bias_GNL) if self.carried else written.sum() / bias_GNL.shape[0]
        capacity = self.cache_config.max_cache_length // self.widths.latents
        totals = {
            "cache_null_share": (_sum(part.null for part in found), found[0].out[..., 0].numel() * len(found)),
            "cache_entropy": (_sum(part.entropy for part in found), _sum(part.sampled for part in found)),
            "cache_importance": (importance.sum(), count),
            "cache_importance_square": (importance.square().sum(), count),
            "cache_fill": (held / capacity, 1),
            "cache_evictions": (evicted, bias_GNL.shape[0]),
        }
        self.measures.add_all(list(totals), *zip(*totals.values(), strict=True))


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def _behind(earlier: Tensor, later: Tensor) -> Tensor:
    return torch.cat((earlier, later), 1)


def _carried_until(documents: Tensor | None, tokens: int, rows: int, device: torch.device) -> Tensor:
    """(B,) how far into its row the document goes that an earlier row began; 0 where the row begins one."""
    if documents is None:
        return torch.full((rows,), tokens, device=device)
    return (documents == 0).long().cumprod(1).sum(1)
