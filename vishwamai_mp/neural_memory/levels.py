"""The cascade: each level of the memory stores what the level before it missed.

Shapes: T tokens, B batch, H heads, K head width, L levels, P parts of a level's state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vishwamai_mp.neural_memory.delta_rule import empty_state, momentum_delta_rule, one_token
from vishwamai_mp.neural_memory.gates import Gates, open_gates


@dataclass(frozen=True)
class LevelState:
    """What a level knows: its memory, (B, H, P, K, K) fp32, and the momentum ratio of its last token, (B, H)."""

    memory: Tensor
    ratio: Tensor | None


@dataclass(frozen=True)
class LevelReport:
    """Sums over all tokens and heads of a level: ‖u‖² (None where it was not computed), α and β."""

    surprise: Tensor | None
    retention: Tensor
    write: Tensor


def run_levels(
    projected: Sequence[Tensor],
    gate_logits: Tensor,
    starts: Tensor | None,
    states: Sequence[LevelState] | None,
    chunk_size: int,
) -> tuple[list[Tensor], list[LevelState], list[LevelReport]]:
    """Write all tokens into all levels and read each level.

    Args:
        projected: reads, keys and values of level 1, then of level 2, …; (T, B, H, K) each.
        gate_logits: (T, B, H, L, 2 or 3).
        starts: (T, B) bool, True at a document's first token; None: nowhere.
        states: of the levels before the first token; None: empty.
        chunk_size: see `momentum_delta_rule`.

    Returns:
        what was read at each level, (T, B, H, K) each; the levels' next states; reports.
    """
    count = gate_logits.shape[-2]
    outputs, after, reports = [], [], []
    missed: Tensor | None = None
    for level in range(count):
        queries, keys, values = projected[3 * level : 3 * level + 3]
        gates = open_gates(gate_logits[..., level, :], states[level].ratio if states else None)
        if missed is not None:
            values = values - missed
        # What this level answers to the next level's keys is what the next need not store.
        reads = [queries] if level == count - 1 else [queries, projected[3 * level + 4]]
        memory = states[level].memory if states else empty_state(keys, values, gates.log_momentum is not None)
        found, memory, surprise = _write_and_read(reads, keys, values, gates, starts, memory, chunk_size)
        outputs.append(found[0])
        missed = found[-1]
        after.append(LevelState(memory, gates.ratio))
        with torch.no_grad():
            reports.append(LevelReport(surprise, gates.log_forget.exp().sum(), gates.write.sum()))
    return outputs, after, reports


def _write_and_read(
    reads: list[Tensor],
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    starts: Tensor | None,
    memory: Tensor,
    chunk_size: int,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """In chunks, or where there is a single token to read, by the recurrence."""
    if len(keys) > 1 or starts is not None or torch.is_grad_enabled():
        return momentum_delta_rule(
            reads, keys, values, gates.log_forget, gates.log_momentum, gates.rate, starts, memory, chunk_size
        )
    log_momentum = None if gates.log_momentum is None else gates.log_momentum[0]
    first = [read[0] for read in reads]
    found, memory = one_token(first, keys[0], values[0], gates.log_forget[0], log_momentum, gates.rate[0], memory)
    return [out[None] for out in found], memory, None
