"""Choices over vocabulary-parallel logits against the gathered computation."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.inference.sampling import _gumbel, choose

_VOCABULARY, _PADDED = 250, 512  # of four shards, the third and the fourth hold padding only
_SIZES = (1, 2, 4)


def logits(rows: int, kind: str) -> Tensor:
    """Padding is the most likely of all, should anyone look."""
    generator = torch.Generator().manual_seed(11)
    values = torch.randn(rows, _PADDED, generator=generator)
    if kind == "ties":  # few distinct values, so that the best, and the k-th best, are shared
        values = (values * 2).round() / 2
    values[:, _VOCABULARY:] = 100.0
    return values.bfloat16() if kind in ("ties", "bf16") else values


def chosen(rows: int, kind: str, options: dict[str, Any]) -> Tensor:
    """Runs in a worker."""
    group = dist.group.WORLD
    assert group is not None
    return choose(logits(rows, kind).chunk(group.size(), -1)[group.rank()], _VOCABULARY, group, **options)


def on_all_sizes(workers: Any, rows: int, kind: str, **options: Any) -> Tensor:
    """The choice, after a check that every rank of every size makes the same."""
    results = [result for size in _SIZES for result in workers.run(chosen, size, rows, kind, options)]
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


@pytest.mark.parametrize("kind", ["fp32", "bf16", "ties"])
def test_greedy_is_the_first_of_the_largest(workers, kind):
    rows = logits(64, kind)[:, :_VOCABULARY].tolist()
    expected = [row.index(max(row)) for row in rows]
    assert on_all_sizes(workers, 64, kind).tolist() == expected
    if kind == "ties":
        assert sum(row.count(max(row)) > 1 for row in rows) > 10


@pytest.mark.parametrize("kind", ["fp32", "bf16", "ties"])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (5, 0.7), (60, 2.0), (None, 1.3), (1000, 1.3)])
def test_sampling_is_the_gathered_computation(workers, kind, top_k, temperature):
    """Among the k likeliest, ties to the lower id, the largest of logit / temperature + noise."""
    options = {"temperature": temperature, "top_k": top_k, "seed": 3, "position": 17}
    ours = on_all_sizes(workers, 64, kind, **options)
    rows = logits(64, kind)[:, :_VOCABULARY].double()
    noise = _gumbel(3, 17, torch.arange(_VOCABULARY).expand(64, -1))
    for row in range(64):
        candidates = sorted(range(_VOCABULARY), key=lambda i: (-float(rows[row, i]), i))[:top_k]
        scores = {i: float(rows[row, i]) / temperature + float(noise[row, i]) for i in candidates}
        assert int(ours[row]) == max(scores, key=lambda i: (scores[i], -i))


def test_one_candidate_is_the_greedy_choice(workers):
    greedy = on_all_sizes(workers, 64, "ties")
    assert torch.equal(on_all_sizes(workers, 64, "ties", temperature=5.0, top_k=1), greedy)


def test_padding_is_never_chosen(workers):
    for options in ({}, {"temperature": 50.0}, {"temperature": 50.0, "top_k": 400}):
        tokens = on_all_sizes(workers, 2000, "fp32", **options)
        assert int(tokens.max()) < _VOCABULARY
    assert len(tokens.unique()) > 200


_FEW = 20


def frequencies(temperature: float, top_k: int | None, vary: str) -> tuple[Tensor, Tensor]:
    """Runs in a worker: how often each of 20 tokens was chosen in 20,000 draws, and the probabilities asked for."""
    row = torch.randn(1, _FEW, generator=torch.Generator().manual_seed(1))
    group = dist.group.WORLD
    assert group is not None
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
    if vary == "row":
        tokens = choose(row.expand(20_000, -1), _FEW, group, **options)
    else:
        draws = [choose(row.expand(10, -1), _FEW, group, **{vary: i}, **options) for i in range(2000)]
        tokens = torch.cat(draws)
    probabilities = (row[0].double() / temperature).softmax(0)
    if top_k:
        kept = probabilities.topk(top_k).indices
        probabilities = torch.zeros_like(probabilities).scatter(
            0, kept, probabilities[kept] / probabilities[kept].sum()
        )
    return tokens.bincount(minlength=_FEW), probabilities


@pytest.mark.parametrize(
    ("temperature", "top_k", "vary"),
    [(1.0, None, "row"), (0.5, None, "row"), (1.0, 6, "row"), (2.0, None, "position"), (1.0, 6, "seed")],
)
def test_frequencies_are_the_softmax(workers, temperature, top_k, vary):
    """Pearson's chi-square over rows, positions and seeds: below its 99.9 % quantile. The draws are fixed by seeds."""
    counts, probabilities = workers.run(frequencies, 1, temperature, top_k, vary)[0]
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible] * counts.sum()
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    quantile = {20: 43.82, 6: 20.52}[int(possible.sum())]  # degrees of freedom: one fewer
    assert statistic < quantile


def test_rows_positions_and_seeds_draw_apart():
    ids = torch.arange(1000).expand(2, -1)
    one = _gumbel(0, 0, ids)
    assert not (one[0] == one[1]).any()
    for seed, position in ((1, 0), (0, 1), (-1, 0), (2**40, 0)):
        assert not (_gumbel(seed, position, ids) == one).any()
    assert one.isfinite().all()
    # Standard Gumbel: Euler's constant and π²/6.
    assert abs(float(one.mean()) - 0.5772) < 0.1
    assert abs(float(one.var()) - 1.6449) < 0.3
