"""The whole memory between its two projections by kernels: convolution, gates, the rule level by level, mix and norm.

Shapes: as in `surrounding_kernels.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vishwamai_mp.config.component_shapes import CONVOLUTION_TAPS as TAPS
from vishwamai_mp.neural_memory import delta_rule_on_gpu
from vishwamai_mp.neural_memory.delta_rule_on_gpu import Launches
from vishwamai_mp.runtime import triton_kernels
from vishwamai_mp.runtime.triton_kernels import power_of_two, sum_parts

_TOKENS = 16  # of a row that a program has in its registers
_PROGRAMS = 64  # of a row at most: each leaves sums of gradients behind
_WARPS = 4
_ENTER_BACK_WARPS = 8  # in four, it would spill registers on sm_80


class Parameters(NamedTuple):
    """The memory's own, of the heads at hand.

    Attributes:
        taps: (H, 3·L·K·J).
        gate_bias: (H, L·G).
        read_norm: (H, K).
        level_mix: (H, L); None with one level.
    """

    taps: Tensor
    gate_bias: Tensor
    read_norm: Tensor
    level_mix: Tensor | None


class Remembered(NamedTuple):
    """What came of it: `read` (T, B, H, K), gated; Σ of ‖u‖², α, β for all levels each, and of the read gate, in fp64.

    And the state: `recent` (J − 1, B, H, 3·L·K), ratios (L, B, H), memories (B, H, P, K, K) of each level.
    """

    read: Tensor
    sums: Tensor
    recent: Tensor
    ratios: Tensor
    memories: tuple[Tensor, ...]


def supports(projected: Tensor, parameters: Parameters) -> bool:
    """Whether the kernels compute this case: where the rule's do, rows that the convolution does not look beyond."""
    x, width = projected, parameters.read_norm.shape[1]
    narrow = x[..., :width]
    return len(x) >= TAPS and delta_rule_on_gpu.supports([narrow], narrow, narrow)


def remember(
    projected: Tensor,
    parameters: Parameters,
    documents: Tensor | None,
    recent: Tensor | None,
    ratios: Tensor | None,
    memories: Sequence[Tensor | None],
    chunk_size: int,
    epsilon: float,
) -> Remembered:
    """Write all tokens and read after each.

    Args:
        projected: (T, B, H, 3·L·K + K + L·G).
        parameters: see there.
        documents: (B, T), see `ReasoningMemoryTransformer.forward`.
        recent: the state before, as `Remembered` has it; so are `ratios`, which only momentum has; None: there is none.
        memories: of each level, in fp32; None: empty.
        chunk_size: see `momentum_delta_rule`.
        epsilon: of the norm.
    """
    read, sums, recent, ratios, *after = _Remember.apply(
        chunk_size, epsilon, len(memories), documents, recent, projected, *parameters, ratios, *memories
    )
    return Remembered(read, sums, recent, ratios, tuple(after))


class _Remember(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk_size: int, epsilon: float, levels: int, *given: Any) -> Any:
        documents, recent, projected, *own, ratios = given[:8]
        call = Surroundings(chunk_size, epsilon, documents, recent, projected.contiguous(), Parameters(*own), given[8:])
        result, kept = call.forward(ratios)
        ctx.chunk_size, ctx.epsilon, ctx.levels = chunk_size, epsilon, levels
        ctx.save_for_backward(*given, *kept)
        ctx.mark_non_differentiable(result.sums, result.recent)
        ctx.set_materialize_grads(False)
        return *result[:4], *result.memories

    @staticmethod
    def backward(ctx: Any, d_read: Tensor | None, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        documents, recent, projected, *own, ratios = saved[:8]
        states, kept = saved[8 : 8 + ctx.levels], saved[8 + ctx.levels :]
        call = Surroundings(
            ctx.chunk_size, ctx.epsilon, documents, recent, projected.contiguous(), Parameters(*own), states
        )
        d_projected, d_own, d_ratios, d_states = call.backward(kept, d_read, grads[2], grads[3:])
        return None, None, None, None, None, d_projected, *d_own, None if ratios is None else d_ratios, *d_states


class Surroundings:
    """The launches of one call; arguments are those of `remember`."""

    def __init__(
        self,
        chunk_size: int,
        epsilon: float,
        documents: Tensor | None,
        recent: Tensor | None,
        projected: Tensor,
        parameters: Parameters,
        memories: Sequence[Tensor | None],
    ) -> None:
        self.chunk_size, self.epsilon, self.documents = chunk_size, epsilon, documents
        self.recent = None if recent is None else recent.contiguous()
        self.projected = projected
        self.states = [None if memory is None else memory.contiguous() for memory in memories]
        self.parameters = parameters
        self.length, self.batch, self.heads, self.features = projected.shape
        self.levels, self.width = len(memories), parameters.read_norm.shape[1]
        self.gates = parameters.gate_bias.shape[1] // self.levels
        self.rows = self.batch * self.heads
        span = -(-self.length // (_PROGRAMS * _TOKENS)) * _TOKENS
        self.programs = -(-self.length // span)
        self.sizes = [self.length, self.rows, self.heads, self.features, self.width, span]

    def forward(self, ratios: Tensor | None) -> tuple[Remembered, list[Tensor | None]]:
        """What came of it; what `backward` needs again."""
        levels, shape = self.levels, (self.length, self.batch, self.heads)
        slices = self._new(*shape, 3 * levels, self.width, like=self.projected)
        gates, outputs = self._new(3, levels, *shape), self._new(levels, *shape, self.width, like=self.projected)
        starts = None if self.documents is None else self._new(*shape[:2], dtype=torch.bool)
        recent = self._new(TAPS - 1, *shape[1:], 3 * levels * self.width, like=self.projected)
        last_ratios = self._new(levels, *shape[1:])
        parts = self._new(self.programs, self.rows, 3 * levels + 1)
        self._launch(
            "enter",
            [*self._entering(), last_ratios if ratios is None else ratios.contiguous(), *self._documents()],
            [gates if starts is None else starts.view(torch.uint8), slices, gates, recent, last_ratios, parts],
        )
        updates, after = [], []
        surprise = None
        for level in range(levels):
            rule = self._rule(level, slices, gates, starts)
            if surprise is None:
                surprise = self._new(levels, rule.surprise_count)
            found = [outputs[level]]
            if level < levels - 1:  # what the next level need not store is taken off its values
                found.append(slices[..., 3 * level + 5, :])
            _, memory, _, update = rule.forward(found, surprise[level])
            updates.append(update)
            after.append(memory)
        gated = self._new(*shape, self.width, like=self.projected)
        assert surprise is not None
        blocks = surprise.shape[1] // self.rows
        self._launch("leave", [outputs, self.projected, *self._leaving(), surprise], [gated, parts], blocks)
        sums = parts.sum((0, 1), dtype=torch.float64)
        return Remembered(gated, sums, recent, last_ratios, tuple(after)), [slices, gates, starts, outputs, *updates]

    def backward(
        self,
        kept: Sequence[Any],
        d_gated: Tensor | None,
        d_ratios: Tensor | None,
        d_after: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[Tensor | None], Tensor, list[Tensor | None]]:
        """Gradients of `projected`, of the parameters, of the ratios before and of the memories before."""
        slices, gates, starts, outputs, *updates = kept
        levels, d_gates = self.levels, self._new(*gates.shape)
        d_gated = torch.zeros_like(outputs[0]) if d_gated is None else d_gated.contiguous()
        d_projected, d_outputs = torch.empty_like(self.projected), torch.empty_like(outputs)
        # Of a head: norm and mix, which the first kernel leaves behind; taps and gates' biases, which the last does.
        sizes = self.width, levels, slices[0, 0, 0].numel() * TAPS, levels * self.gates
        across, last = self.heads * sum(sizes), self.heads * sum(sizes[:2])
        parts = self._new(self.programs, self.batch, across)
        self._launch(
            "leave_back",
            [outputs, self.projected, *self._leaving(), d_gated],
            [d_outputs, d_projected, parts],
            across,
        )
        d_mixed = self._new(4 * levels - 1, *outputs.shape[1:], like=outputs)
        d_states: list[Tensor | None] = [None] * levels
        for level in reversed(range(levels)):
            d_found, into = [d_outputs[level]], list(d_mixed[4 * level : 4 * level + 3])
            if level < levels - 1:
                d_found.append(d_mixed[4 * level + 6])  # it was taken off the next level's values
                into.append(d_mixed[4 * level + 3])
            momentum = d_gates[2, level] if self.gates == 3 else None
            d_query, d_key, d_value, *d_answer = into
            d_memory = d_after[level]
            d_states[level], *_ = self._rule(level, slices, gates, starts).backward(
                updates[level],
                d_found,
                None if d_memory is None else d_memory.contiguous(),
                [d_key, d_value, d_gates[1, level], momentum, d_gates[0, level], d_query, *d_answer],
            )
        self._launch(
            "enter_back",
            [
                *self._entering(),
                *self._documents(),
                d_mixed,
                d_gates,
                gates if d_ratios is None else d_ratios.contiguous(),
            ],
            [d_projected, parts[..., last:]],
            across,
            CARRIED=d_ratios is not None,
        )
        d_norm, d_mix, d_taps, d_bias = self._summed(parts, *sizes)
        own = [d_taps, d_bias, d_norm, None if self.parameters.level_mix is None else d_mix]
        d_states = [None if state is None else found for state, found in zip(self.states, d_states, strict=True)]
        return d_projected, own, d_gates[2, :, 0], d_states

    def _rule(self, level: int, slices: Tensor, gates: Tensor, starts: Tensor | None) -> Launches:
        reads, keys, values, *later = slices.unbind(3)[3 * level : 3 * level + 5]
        momentum = gates[2, level] if self.gates == 3 else None
        tokens = [keys, values, gates[1, level], momentum, gates[0, level], reads, *later[1:]]
        return Launches(self.chunk_size, starts, self.states[level], *tokens, taken=True)

    def _entering(self) -> list[Tensor]:
        own = self.parameters
        return [self.projected, self.projected if self.recent is None else self.recent, own.taps, own.gate_bias]

    def _leaving(self) -> list[Tensor]:
        own = self.parameters
        return [own.read_norm if own.level_mix is None else own.level_mix, own.read_norm]

    def _documents(self) -> list[Tensor]:
        return [self.projected if self.documents is None else self.documents.contiguous()]

    def _summed(self, parts: Tensor, *widths: int) -> list[Tensor]:
        """(P, B, H · Σ widths) → (H, width) each, in the parameters' dtype."""
        found = sum_parts(parts.flatten(0, 1), self.parameters.read_norm.dtype)
        pieces = found.split([self.heads * width for width in widths])
        return [piece.view(self.heads, width) for piece, width in zip(pieces, widths, strict=True)]

    def _launch(self, name: str, inputs: list[Any], outputs: list[Tensor], *sizes: int, **constants: Any) -> None:
        common = {"LEVELS": self.levels, "TB": _TOKENS, "KP": power_of_two(self.width)}
        if name.startswith("enter"):
            common |= {"GATES": self.gates, "BEFORE": self.recent is not None}
            common |= {"STARTS": self.documents is not None}
            wanted: list[float] = [*self.sizes, *sizes]
        else:
            common |= {"LP": power_of_two(self.levels, 1)}
            wanted = [*self.sizes, self.epsilon, *sizes]
        triton_kernels.run_kernel(
            "neural_memory.surrounding_kernels",
            name,
            (self.programs, self.rows),
            inputs,
            outputs,
            wanted,
            common | constants,
            warps=_ENTER_BACK_WARPS if name == "enter_back" else _WARPS,
        )

    def _new(self, *shape: int, like: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype if like is None else like.dtype, device=self.projected.device)
