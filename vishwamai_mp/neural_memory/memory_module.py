"""The neural memory inside a layer: x + dropout(W_o(gate ⊙ norm(read))), identity at initialisation.

Shapes: S tokens of this rank (after sequence and context parallelism), Q after context parallelism, T tokens of whole
rows, B rows, D width, H heads (of this tensor parallel rank; under context parallelism T goes with H / ranks), K head
width, L levels, G gates of a level, J taps of the convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from vishwamai_mp.components.head_sharded import HeadShardedModule, Linears
from vishwamai_mp.components.standalone import Standalone, alone
from vishwamai_mp.config import MemoryConfig
from vishwamai_mp.config.component_shapes import CONVOLUTION_TAPS as TAPS
from vishwamai_mp.config.component_shapes import memory_widths
from vishwamai_mp.neural_memory.carried_state import CarriedState
from vishwamai_mp.neural_memory.convolution import causal_convolution
from vishwamai_mp.neural_memory.gates import gate_count, initial_biases
from vishwamai_mp.neural_memory.levels import LevelState, run_levels
from vishwamai_mp.neural_memory.memory_on_gpu import Parameters, remember, supports
from vishwamai_mp.neural_memory.token_exchange import gather_tokens, scatter_tokens
from vishwamai_mp.runtime.measures import Measures

_REPORTED = ("surprise", "retention", "write")  # of each level


@dataclass(frozen=True)
class MemoryState:
    """What the memory knows after some tokens: an immutable value, so keeping it is a snapshot.

    Attributes:
        recent: (J − 1, B, H, 3·L·K) the last tokens' projections, for the convolution.
        levels: of each level.
    """

    recent: Tensor
    levels: tuple[LevelState, ...]

    def detached(self) -> "MemoryState":
        """The same values without their history. Rows that are not finite (a step that is skipped) begin empty."""
        finite = self.recent.isfinite().flatten(2).all(2).all(0)
        for level in self.levels:
            finite = finite & level.memory.isfinite().flatten(1).all(1)

        def keep(x: Tensor, rows: Tensor) -> Tensor:
            return x.detach().where(rows, 0)

        levels = tuple(
            LevelState(
                keep(level.memory, finite[:, None, None, None, None]),
                None if level.ratio is None else keep(level.ratio, finite[:, None]),
            )
            for level in self.levels
        )
        return MemoryState(keep(self.recent, finite[:, None, None]), levels)


class ReasoningMemoryTransformer(Standalone, HeadShardedModule):
    """Levels of fast weights, written by gradient descent at every token and read after it.

    A head's features in the projection: query, key and value of each level, read gate, gates.

    Args:
        config: resolved. Alone, outside a model, the component stands for itself, in one process and in fp32.
        megatron: megatron-core's configuration.
        groups: process groups; heads are split over `tp` and again over `cp`.
        layer_number: from 1.
        linears: classes of the backend.
    """

    section = "memory"

    def __init__(
        self,
        config: MemoryConfig,
        megatron: TransformerConfig | None = None,
        groups: ProcessGroupCollection | None = None,
        layer_number: int = 1,
        *,
        linears: Linears | None = None,
    ) -> None:
        if megatron is None or groups is None or linears is None:
            config, megatron, groups, linears = alone(self.section, config)
        assert config.hidden_size is not None
        size, head_dim = memory_widths(config)
        levels, gates = config.num_memory_layers, gate_count(config.momentum)
        convolved = 3 * levels * head_dim  # features per head that the convolution sees
        super().__init__(
            megatron,
            groups,
            layer_number,
            linears,
            width=config.hidden_size,
            heads=size // head_dim,
            features=convolved + head_dim + levels * gates,
            read_width=size,
        )
        self.memory_config, self.levels, self.head_dim = config, levels, head_dim
        self.gates, self.convolved = gates, convolved
        self.taps = self.of_heads(self._initial_taps())
        self.gate_bias = self.of_heads(torch.tensor(initial_biases(self.levels, config.momentum)))
        self.read_norm = self.of_heads(torch.ones(self.head_dim))
        self.level_mix = self.of_heads(torch.zeros(self.levels)) if self.levels > 1 else None
        self.measures = Measures(*self._level_measures(), "memory_read", "memory_mix_loss")
        self.carried = CarriedState(megatron) if config.carry_state else None

    def _initial_taps(self) -> Tensor:
        """Of one head, (3·L·K·J,): queries and values are those of their token, keys the mean of it and the one before.

        So a value is found by the token that it follows from the first step on, and recall is learned soon.
        """
        taps = torch.zeros(self.levels, 3, self.head_dim, TAPS)
        taps[..., -1] = 1.0
        taps[:, 1, :, -2:] = 0.5
        return taps.flatten()

    def _own_heads(self, parameter: Tensor) -> Tensor:
        """(H, ·) of the heads whose tokens this context parallel rank works on."""
        heads = self.heads // self.groups.cp.size()
        by_head = parameter.view(self.heads, -1)
        return by_head if heads == self.heads else by_head.narrow(0, heads * self.groups.cp.rank(), heads)

    def forward(
        self, hidden: Tensor, documents: Tensor | None = None, state: MemoryState | None = None
    ) -> tuple[Tensor, MemoryState | None]:
        """Add what the memory answers to each token.

        Args:
            hidden: (S, B, D).
            documents: (B, T) ids of whole rows, constant inside a document and different between neighbours; None:
                each row is one document. With `carry_state`, 0 in a row's first place says that it goes on where the
                last row of its place in the batch ended.
            state: decoding: what `forward` returned for the tokens before.

        Returns:
            (S, B, D) and the state after these tokens.
        """
        normed, hidden = self.normed(hidden)
        projected, _ = self.projection(normed)
        projected = gather_tokens(projected.unflatten(-1, (self.heads, -1)), self.groups.cp)
        carrying = self.carried is not None and self.training
        if self.carried is not None and carrying:
            state = self.carried.before(projected.shape[1])
        read, after, sums = self._remember(projected, documents, state)
        if self.carried is not None and carrying:
            self.carried.keep(after)
        out, _ = self.output(scatter_tokens(read, self.groups.cp).flatten(-2))
        if self.training and torch.is_grad_enabled():
            tokens = projected.shape[0] * projected.shape[1]
            counts = [tokens * projected.shape[2]] * (3 * self.levels)
            self.measures.add_all([*self._level_measures(), "memory_read"], sums, [*counts, read.numel()])
            out = self._attach_loss(out, tokens)
        return hidden + F.dropout(out, self.memory_config.dropout, self.training), after

    def _remember(
        self, projected: Tensor, documents: Tensor | None, state: MemoryState | None
    ) -> tuple[Tensor, MemoryState, Sequence[Tensor] | Tensor]:
        """Convolve, write, read, mix and gate: (T, B, H, ·) → (T, B, H, K). With sums for `_level_measures` and of the
        read gate, by whole tokens in training."""
        mix = None if self.level_mix is None else self._own_heads(self.level_mix)
        taps, gate_bias, read_norm = (self._own_heads(x) for x in (self.taps, self.gate_bias, self.read_norm))
        own = Parameters(taps, gate_bias, read_norm, mix)
        if not supports(projected, own):
            return self._by_operators(projected, own, documents, state)
        recent, ratios = None, None
        memories: list[Tensor | None] = [None] * self.levels
        if state is not None:
            recent, memories = state.recent, [level.memory for level in state.levels]
            held = [level.ratio for level in state.levels if level.ratio is not None]
            ratios = torch.stack(held) if held else None
        found = remember(
            projected,
            own,
            documents,
            recent,
            ratios,
            memories,
            self.memory_config.chunk_size,
            self.config.layernorm_epsilon,
        )
        after: Sequence[Tensor | None] = found.ratios.unbind() if self.gates == 3 else [None] * self.levels
        levels = [LevelState(memory, ratio) for memory, ratio in zip(found.memories, after, strict=True)]
        return found.read, MemoryState(found.recent, tuple(levels)), found.sums

    def _by_operators(
        self, projected: Tensor, own: Parameters, documents: Tensor | None, state: MemoryState | None
    ) -> tuple[Tensor, MemoryState, Sequence[Tensor]]:
        inputs, read_gate, logits = projected.split([self.convolved, self.head_dim, self.levels * self.gates], dim=-1)
        starts = None if documents is None else _document_starts(documents)
        heads = inputs.shape[2]
        flat = inputs.flatten(2)
        before = None if state is None else state.recent.flatten(2)
        taps = own.taps.unflatten(-1, (-1, TAPS)).flatten(0, 1).t().contiguous()
        counted = None if starts is None else F.pad(starts.cumsum(0), (0, 0, TAPS - 1, 0))
        mixed = causal_convolution(flat, taps, before, counted)
        parts = mixed.unflatten(-1, (heads, 3 * self.levels, self.head_dim)).unbind(3)
        wide = torch.promote_types(logits.dtype, torch.float32)
        opened = (logits.to(wide) + own.gate_bias.to(wide)).unflatten(-1, (self.levels, self.gates))
        outputs, levels, reports = run_levels(
            parts, opened, starts, state.levels if state else None, self.memory_config.chunk_size
        )
        read = outputs[0]
        if own.level_mix is not None:
            mix = own.level_mix.softmax(-1)[..., None].unbind(1)
            read = outputs[0] * mix[0]
            for out, share in zip(outputs[1:], mix[1:], strict=True):
                read = read + out * share
        normed = F.rms_norm(read, (self.head_dim,), eps=self.config.layernorm_epsilon) * own.read_norm
        gate = read_gate.sigmoid()
        sums: list[Tensor] = []
        if self.training and torch.is_grad_enabled():
            sums = [getattr(report, name) for name in _REPORTED for report in reports]
            sums.append(gate.detach().sum(dtype=torch.float32))
        recent = _last_tokens(flat, before, counted).unflatten(-1, (heads, -1))
        return gate * normed, MemoryState(recent, tuple(levels)), sums

    def reset_memory(self) -> None:
        """Forget what is carried from micro-batch to micro-batch (`carry_state`)."""
        if self.carried is not None:
            self.carried.reset()

    def _level_measures(self) -> list[str]:
        return [f"memory_{name}_{level + 1}" for name in _REPORTED for level in range(self.levels)]

    def _attach_loss(self, out: Tensor, tokens: int) -> Tensor:
        """Add `loss_weight` × (ln L − entropy of the level mix), a mean over heads: least where all levels are used."""
        weight = self.memory_config.loss_weight
        if self.level_mix is None or weight == 0:
            return out
        mix = self._own_heads(self.level_mix).float().softmax(-1)
        shortfall = (mix * (mix * self.levels).log()).sum()
        total = memory_widths(self.memory_config)[0] // self.head_dim
        self.measures.add("memory_mix_loss", weight * shortfall * tokens, len(mix) * tokens)
        return self.measures.attach_loss(out, weight * shortfall * tokens / total)


@torch.no_grad()
def _last_tokens(inputs: Tensor, before: Tensor | None, documents: Tensor | None) -> Tensor:
    """What the convolution of later tokens sees: the last J − 1, zeros where they are of another document."""
    recent = inputs[-(TAPS - 1) :]
    missing = TAPS - 1 - len(recent)
    if missing:
        earlier = inputs.new_zeros(missing, *inputs.shape[1:]) if before is None else before[-missing:]
        recent = torch.cat((earlier, recent))
    if documents is None:
        return recent.clone()  # a view would keep all tokens
    last = documents[-(TAPS - 1) :]
    return recent * (last == last[-1])[..., None]


def _document_starts(documents: Tensor) -> Tensor:
    """(B, T) ids → (T, B) True at the first token of each document, except where a row goes on (id 0)."""
    starts = torch.empty_like(documents, dtype=torch.bool)
    starts[:, 0] = documents[:, 0] != 0
    torch.ne(documents[:, 1:], documents[:, :-1], out=starts[:, 1:])
    return starts.t()
