"""The attention kernel against loops over queries, in fp64: values, gradients, measures."""

import math

import pytest
import torch
from torch import Tensor

from vishwamai_mp.cache_augmentation import read as kernel
from vishwamai_mp.cache_augmentation.read import Chosen, Everything, Latents, read, with_null

G, M, Q, N, L, K = 3, 4, 5, 6, 2, 4


def random_latents(seed: int = 0) -> tuple[Tensor, Latents, Tensor]:
    torch.manual_seed(seed)
    shapes = (G, M, Q, K), (G, N, L, K), (G, N, L, K), (G, N, L), (G, K)
    q, keys, values, bias, null = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, Latents(keys, values, bias), null


def everything() -> tuple[Everything, list]:
    """A plan, and the segments of each (group, block, query)."""
    since = torch.randint(-2, Q + 1, (G, M, N))
    until = since + torch.randint(0, 6, (G, M, N))
    limits = (N + 1, 3, 1, N)
    allowed = [
        [
            [[n for n in range(limits[m] - 1) if since[g, m, n] <= i < until[g, m, n]] for i in range(Q)]
            for m in range(M)
        ]
        for g in range(G)
    ]
    null = torch.zeros(G, M, 1, dtype=torch.long)
    return Everything(torch.cat((null, since), -1), torch.cat((null + Q, until), -1), limits), allowed


def chosen() -> tuple[Chosen, list]:
    shared = torch.stack([torch.randperm(N)[:3] for _ in range(G * M)]).view(G, M, 3)
    known = torch.rand(G, M, 3) < 0.7
    own = torch.randint(0, N, (G, M, Q))
    own_known = (own[..., None] != shared[:, :, None]).all(-1)
    allowed = [
        [
            [shared[g, m][known[g, m]].tolist() + ([int(own[g, m, i])] if own_known[g, m, i] else []) for i in range(Q)]
            for m in range(M)
        ]
        for g in range(G)
    ]
    null = torch.zeros(G, M, 1, dtype=torch.long)
    return Chosen(torch.cat((null, shared + 1), -1), torch.cat((null == 0, known), -1), own + 1, own_known), allowed


def by_loops(q: Tensor, latents: Latents, null: Tensor, allowed: list) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, null weight, entropy, mass."""
    out, share, entropy = torch.zeros_like(q), torch.zeros(G, M, Q).double(), torch.zeros(G, M, Q).double()
    mass = torch.zeros(G, N + 1).double()
    for g, m, i in ((g, m, i) for g in range(G) for m in range(M) for i in range(Q)):
        scores, values = [null[g] @ q[g, m, i] / math.sqrt(K)], [torch.zeros(K).double()]
        for n in allowed[g][m][i]:
            scores += list(latents.keys[g, n] @ q[g, m, i] / math.sqrt(K) + latents.bias[g, n])
            values += list(latents.values[g, n])
        w = torch.stack(scores).softmax(0)
        out[g, m, i] = w @ torch.stack(values)
        share[g, m, i], entropy[g, m, i] = w[0].detach(), -(w * w.log()).sum().detach()
        mass[g, 0] += w[0].detach()
        for place, n in enumerate(allowed[g][m][i]):
            mass[g, n + 1] += w[1 + L * place : 1 + L * (place + 1)].sum().detach()
    return out, share, entropy, mass


@pytest.mark.parametrize("make", [everything, chosen])
@pytest.mark.parametrize("scores_at_once", [1, 2**19])
def test_values_and_measures(monkeypatch, make, scores_at_once):
    monkeypatch.setattr(kernel, "_BLOCK_SCORES", scores_at_once)
    q, latents, null = random_latents()
    plan, allowed = make()
    found = read(q, with_null(latents, null), plan, torch.ones(G, M, Q, dtype=torch.bool))
    out, share, entropy, mass = by_loops(q, latents, null, allowed)
    torch.testing.assert_close(found.out, out)
    torch.testing.assert_close(found.null, share)
    torch.testing.assert_close(found.entropy, entropy[..., :1])
    torch.testing.assert_close(found.mass, mass)


@pytest.mark.parametrize("make", [everything, chosen])
def test_gradients(make):
    """Against differences, and against autograd through the loops."""
    q, latents, null = random_latents(1)
    plan, allowed = make()

    def out(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, null: Tensor) -> Tensor:
        return read(q, with_null(Latents(keys, values, bias), null), plan).out

    inputs = (q, *latents, null)
    assert torch.autograd.gradcheck(out, inputs, fast_mode=True)
    weight = torch.randn(G, M, Q, K, dtype=torch.float64)
    ours = torch.autograd.grad((out(*inputs) * weight).sum(), inputs)
    theirs = torch.autograd.grad((by_loops(q, latents, null, allowed)[0] * weight).sum(), inputs)
    torch.testing.assert_close(ours, theirs)


def test_queries_that_do_not_count_leave_no_mass():
    q, latents, null = random_latents()
    plan, _ = chosen()
    real = torch.rand(G, M, Q) < 0.5
    mass = read(q, with_null(latents, null), plan, real).mass
    assert mass is not None
    assert mass.sum().item() == pytest.approx(real.sum().item())


def test_what_is_kept_for_backward_is_linear():
    """Twice the queries and latents: twice the bytes, not four times."""

    def kept(size: int) -> int:
        q = torch.randn(1, size, 16, K, requires_grad=True)
        latents = with_null(
            Latents(torch.randn(1, size, L, K), torch.randn(1, size, L, K), torch.randn(1, size, L)), q[:, 0, 0]
        )
        since = torch.zeros(1, size, size + 1, dtype=torch.long)
        sizes: dict[int, int] = {}
        hook = lambda x: sizes.setdefault(x.data_ptr(), x.numel()) and x
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda x: x):
            read(q, latents, Everything(since, since + 16, (size + 1,) * size))
        return sum(sizes.values())

    assert kept(64) < 2.1 * kept(32)
