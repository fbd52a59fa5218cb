"""Two-step reading: what is chosen, and that covering all segments gives full attention."""

import math

import pytest
import torch

from tests.cache_augmentation.builds import cache_module, hidden_states
from vishwamai_mp.cache_augmentation import selection
from vishwamai_mp.cache_augmentation.read import Latents
from vishwamai_mp.cache_augmentation.selection import choose, summarise

G, M, Q, N, L, K = 2, 3, 4, 9, 2, 8


def example() -> tuple[torch.Tensor, Latents, torch.Tensor]:
    torch.manual_seed(0)
    keys, bias = torch.randn(G, N, L, K).double(), torch.nn.functional.logsigmoid(torch.randn(G, N, L)).double()
    hidden = torch.zeros(G, M, N, dtype=torch.bool)
    hidden[..., 0] = True
    hidden[:, 0, 3:] = True  # two segments to choose from, fewer than may be retrieved
    return torch.randn(G, M, Q, K).double(), Latents(keys, keys, bias), hidden


@pytest.mark.parametrize("scores_at_once", [1, 2**20])
def test_the_best_are_chosen(monkeypatch, scores_at_once):
    monkeypatch.setattr(selection, "_SCORES", scores_at_once)
    q, latents, hidden = example()
    plan = choose(q, summarise(latents), hidden, retrieve=3)
    for g, m in ((g, m) for g in range(G) for m in range(M)):
        weights = latents.bias[g].exp()
        mean = (weights[..., None] * latents.keys[g]).sum(1) / weights.sum(1, keepdim=True)
        scores = q[g, m] @ mean.t() / math.sqrt(K) + weights.sum(1).log()
        scores[:, hidden[g, m]] = -torch.inf
        seen = int((~hidden[g, m]).sum())
        best = set(scores[0].topk(min(3, seen)).indices.tolist())
        shared = plan.segments[g, m][plan.known[g, m]].tolist()
        assert shared[0] == 0, "the null segment"
        assert len(shared) == len(set(shared))
        assert set(shared[1:]) == best
        for i in range(Q):
            own = int(scores[i].argmax())
            assert plan.own_known[g, m, i] == (own not in best)
            assert own in best or plan.own[g, m, i] == own


def test_a_summary_bounds_what_a_segment_weighs():
    q, latents, _ = example()
    summaries = summarise(latents)
    exact = (torch.einsum("gmqk,gnlk->gmqnl", q, latents.keys) + latents.bias[:, None, None]).logsumexp(-1)
    bound = torch.einsum("gmqk,gnk->gmqn", q, summaries.keys) + summaries.bias[:, None, None]
    assert (bound <= exact + 1e-12).all()
    assert (exact - bound).max() > 1e-3


def outputs(retrieve: int, tokens: int, documents: torch.Tensor | None) -> torch.Tensor:
    module = cache_module(f"cache.retrieve_segments={retrieve}")
    with torch.no_grad():
        return module(hidden_states(tokens, 2), documents)[0]


@pytest.mark.parametrize("packed", [False, True])
def test_covering_all_is_full_attention(workers, packed):
    """40 tokens have 10 segments of 4, of which the last token may read 9."""
    documents = torch.tensor([[0] * 40, [0] * 2 + [1] * 38]) if packed else None
    full = workers.run(outputs, 1, 64, 40, documents)[0]
    for retrieve in (9, 10):
        torch.testing.assert_close(workers.run(outputs, 1, retrieve, 40, documents)[0], full, rtol=0, atol=1e-12)
    fewer = workers.run(outputs, 1, 3, 40, documents)[0]
    torch.testing.assert_close(fewer[:14], full[:14], rtol=0, atol=1e-12)
    assert (fewer - full)[17:].abs().max() > 1e-3
