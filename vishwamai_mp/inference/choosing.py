"""How rows of logits become tokens: greedily or by chance, each row by its own options."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from vishwamai_mp.inference.noise import NoiseNames
from vishwamai_mp.inference.options import SamplingOptions
from vishwamai_mp.inference.vocabulary import Shard, penalise_repetition, sample, sample_among


@dataclass(frozen=True)
class Row:
    """One row of logits: how to choose, the new token's position, and the tokens before it."""

    options: SamplingOptions
    position: int
    seen: list[int]


def choose(shard: Shard, rows: Sequence[Row]) -> Tensor:
    """A token for each row and, where asked for, its log-probability, else a number that is finite if logits are."""
    raw = shard
    if any(row.options.repetition_penalty != 1 for row in rows):
        shard = _penalised(shard, rows)
    chosen = torch.empty(len(rows), 2, dtype=torch.float64, device=shard.values.device)
    order = sorted(range(len(rows)), key=lambda i: [x or 0 for x in rows[i].options.filters])
    for filters, group in groupby(order, key=lambda i: rows[i].options.filters):
        indices = list(group)
        if len(indices) == len(rows):
            chosen[:, 0], chosen[:, 1] = _choose_alike(shard, rows, *filters)
        else:
            index = torch.tensor(indices, device=chosen.device)
            chosen[index, 0], chosen[index, 1] = (
                x.double() for x in _choose_alike(shard.rows(index), [rows[i] for i in indices], *filters)
            )
    if any(row.options.log_probs for row in rows):
        chosen[:, 1] = raw.log_probs(chosen[:, :1].long())[:, 0]
    return chosen


def _choose_alike(
    shard: Shard,
    rows: Sequence[Row],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor]:
    if temperature == 0:
        values, ids = shard.best()
        return ids, values
    names = NoiseNames.of([(r.options.seed, r.options.sample, r.position) for r in rows], shard.values.device)
    if top_k is None and top_p is None and min_p is None:
        return sample(shard, temperature, names), shard.highest
    return sample_among(shard, temperature, names, top_k, top_p, min_p), shard.highest


def _penalised(shard: Shard, rows: Sequence[Row]) -> Shard:
    device = shard.values.device
    longest = max(len(row.seen) for row in rows)
    seen = torch.tensor([row.seen + [-1] * (longest - len(row.seen)) for row in rows], device=device)
    return penalise_repetition(shard, seen, torch.tensor([row.options.repetition_penalty for row in rows]).to(device))
