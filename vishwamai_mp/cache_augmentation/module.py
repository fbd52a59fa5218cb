"""The cache inside a layer: x + retrieval_factor · W_o(read), identity at initialisation.

Shapes: S tokens of this rank (after sequence and context parallelism), T tokens of whole rows, C tokens on this context
parallel rank, B rows, D width, H heads (local), K head width, L latents per segment, N segments, E importance width.
"""

from typing import Any

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from vishwamai_mp.cache_augmentation.attention import ChunkReading, Reader
from vishwamai_mp.cache_augmentation.carry import CarriedCache, belonging
from vishwamai_mp.cache_augmentation.context import chunk_starts, gather_pooled
from vishwamai_mp.cache_augmentation.decoding import CacheState, Decoder
from vishwamai_mp.cache_augmentation.read import Latents, with_null
from vishwamai_mp.cache_augmentation.segments import Segments, locate
from vishwamai_mp.cache_augmentation.write import Widths, initial_positions, latents_of, pool_whole_rows
from vishwamai_mp.config import CacheConfig
from vishwamai_mp.precision.modules import Linears
from vishwamai_mp.runtime.measures import Measures

IMPORTANCE_WIDTH = 8
_MEASURES = (
    "cache_entropy",  # of a token's weights over latents and null slot, nats
    "cache_null_share",
    "cache_importance",  # mean of σ, and of its square: their difference says how it is spread
    "cache_importance_square",
    "cache_fill",  # segments held / capacity
    "cache_evictions",  # segments per head and row
)


class DifferentiableCacheAugmentation(MegatronModule):
    """Latents of past segments, written by learned pooling and read by attention with importance and a null slot.

    Args:
        config: resolved.
        megatron: megatron-core's configuration.
        groups: process groups; heads are split over `tp`, tokens over `cp`.
        layer_number: from 1.
        linears: classes of the backend.
    """

    def __init__(
        self,
        config: CacheConfig,
        megatron: TransformerConfig,
        groups: ProcessGroupCollection,
        layer_number: int,
        *,
        linears: Linears,
    ) -> None:
        super().__init__(megatron)
        self.cache_config, self.groups, self.layer_number = config, groups, layer_number
        assert config.hidden_size is not None
        width, tensor = config.hidden_size, groups.tp.size()
        self.widths = Widths(width // config.num_heads, IMPORTANCE_WIDTH, config.latents_per_segment)
        self.heads = config.num_heads // tensor
        # init_method: never called, initial values are model/initialization.py's.
        options: dict[str, Any] = {
            "config": megatron,
            "init_method": nn.init.zeros_,
            "bias": False,
            "skip_bias_add": False,
            "is_expert": False,
            "tp_group": groups.tp,
        }
        self.norm = linears.norm(config=megatron, hidden_size=width, eps=megatron.layernorm_epsilon)
        self.projection = linears.column(width, config.num_heads * self.widths.total, gather_output=False, **options)
        self.output = linears.row(width, width, input_is_parallel=True, **options)
        nn.init.zeros_(self.output.weight)
        self.position_bias = self._of_heads(initial_positions(config.latents_per_segment, config.segment_length))
        self.importance_weight = self._of_heads(torch.full((IMPORTANCE_WIDTH,), 1 / IMPORTANCE_WIDTH))
        self.importance_bias = self._of_heads(torch.zeros(1))
        self.null_key = self._of_heads(torch.zeros(self.widths.head))
        self.measures = Measures(*_MEASURES)
        capacity = config.max_cache_length // config.latents_per_segment
        self.carried = CarriedCache(megatron, capacity) if config.carry_state else None

    def _of_heads(self, one_head: Tensor) -> nn.Parameter:
        """A tensor for each head of this rank, end to end: one dimension, so that weight decay leaves it alone."""
        parameter = nn.Parameter(one_head.flatten().repeat(self.heads).to(self.config.params_dtype))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

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
        projected, _ = self.projection(self.norm(hidden))
        query, content, scores = self.widths.split(projected.unflatten(-1, (self.heads, self.widths.total)))
        alone = not self.training and documents is None and self.groups.cp.size() == 1
        if state is None and not (alone and query.shape[0] < self.cache_config.segment_length):
            read, after = self._read_rows(query, content, scores, documents, alone)
        else:
            assert alone, "a state continues single documents, in evaluation"
            state = state or self._decoder().empty(query, content, scores)
            read, after = self._decoder().advance(query, content, scores, state)
        out, _ = self.output(read.flatten(-2))
        out = F.dropout(out, self.cache_config.dropout, self.training)
        return hidden + self.cache_config.retrieval_factor * out, after

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
        evicted = 0
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
    def _measure(self, found: list[ChunkReading], bias_GNL: Tensor, segments: Segments, evicted: int) -> None:
        for name, total, count in (
            ("cache_null_share", "null", found[0].out[..., 0].numel() * len(found)),
            ("cache_entropy", "entropy", sum(part.sampled for part in found)),
        ):
            self.measures.add(name, torch.stack([getattr(part, total) for part in found]).sum(), count)
        rows = bias_GNL.shape[0] // self.heads
        written = (segments.until > 0).expand(rows, -1).repeat_interleave(self.heads, 0)[..., None]
        importance, count = bias_GNL.exp() * written, written.sum() * bias_GNL.shape[2]
        self.measures.add("cache_importance", importance.sum(), count)
        self.measures.add("cache_importance_square", importance.square().sum(), count)
        held = self.carried.fill if self.carried else written.sum() / bias_GNL.shape[0]
        capacity = self.cache_config.max_cache_length // self.widths.latents
        self.measures.add("cache_fill", torch.as_tensor(held / capacity), 1)
        self.measures.add("cache_evictions", torch.as_tensor(float(evicted)), bias_GNL.shape[0])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Parameters by head, so that a checkpoint loads at any tensor parallel size."""
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        dp_cp = (metadata or {}).get("dp_cp_group", self.groups.dp_cp)
        entries = make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, tp_group=self.groups.tp, dp_cp_group=dp_cp
        )
        for name, module in self.named_children():
            entries |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.groups.tp
            )
        return entries


def _behind(earlier: Tensor, later: Tensor) -> Tensor:
    return torch.cat((earlier, later), 1)


def _carried_until(documents: Tensor | None, tokens: int, rows: int, device: torch.device) -> Tensor:
    """(B,) how far into its row the document goes that an earlier row began; 0 where the row begins one."""
    if documents is None:
        return torch.full((rows,), tokens, device=device)
    return (documents == 0).long().cumprod(1).sum(1)
