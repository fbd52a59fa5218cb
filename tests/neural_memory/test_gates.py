"""The gates keep the memory bounded, whatever they do from token to token."""

import math

import pytest
import torch

from vishwamai_mp.neural_memory.delta_rule import momentum_delta_rule
from vishwamai_mp.neural_memory.gates import MAX_MOMENTUM, initial_biases, open_gates, write_limit

_EXTREME = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4])


def _step_matrices(held, forget, write):
    """One token's map of (w, r) along its key, with values of zero. (…, 2, 2)."""
    error = torch.tensor([1.0, -1.0], dtype=torch.float64)  # M = W − R
    w = forget[..., None] * torch.tensor([1.0, 0.0]) - write[..., None] * error
    r = held[..., None] * (forget[..., None] * torch.tensor([0.0, 1.0]) - write[..., None] * error)
    return torch.stack((w, r), -2)


def test_no_token_makes_the_memory_grow():
    """The norm of the docstring, over a fine grid of all gates: each map's norm is at most 1."""
    grid = torch.linspace(0, 1, 41, dtype=torch.float64)
    held, forget, write = torch.meshgrid(MAX_MOMENTUM * grid, grid, grid, indexing="ij")
    maps = _step_matrices(held, forget, write * write_limit(held))
    scale = torch.tensor([1.0, 1 / math.sqrt(MAX_MOMENTUM)], dtype=torch.float64)
    norms = torch.linalg.matrix_norm(scale[:, None] * maps / scale, 2)
    assert float(norms.max()) <= 1 + 1e-12
    beyond = _step_matrices(held, forget, 1.2 * write_limit(held))
    assert float(torch.linalg.matrix_norm(scale[:, None] * beyond / scale, 2).max()) > 1.02, "the limit is tight"


def test_gates_are_the_rule_that_the_bound_is_about():
    """W and R as the docstring defines them, against M of the momentum delta rule with these gates."""
    generator = torch.Generator().manual_seed(0)
    length, width = 60, 4
    logits = 2 * torch.randn(length, 1, 1, 3, generator=generator, dtype=torch.float64)
    keys, values, reads = torch.randn(3, length, 1, 1, width, generator=generator, dtype=torch.float64)
    gates = open_gates(logits)
    (found,), _, _ = momentum_delta_rule(
        [reads], keys, values, gates.log_forget, gates.log_momentum, gates.rate, chunk_size=16
    )
    written = released = torch.zeros(width, width, dtype=torch.float64)
    for t in range(length):
        k, q = (x[t, 0, 0] / x[t, 0, 0].norm() for x in (keys, reads))
        update = torch.outer(k, values[t, 0, 0] - k @ (written - released))
        forget, write = gates.log_forget[t].exp(), gates.write[t]
        held = MAX_MOMENTUM * logits[t, ..., 2].sigmoid()
        written, released = forget * written + write * update, held * (forget * released + write * update)
        torch.testing.assert_close(found[t, 0, 0], q @ (written - released), rtol=1e-9, atol=1e-9)


def test_gates_continue_from_the_last_token():
    logits = torch.randn(20, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, first = open_gates(logits), open_gates(logits[:7])
    second = open_gates(logits[7:], first.ratio)
    assert first.log_momentum is not None
    assert second.log_momentum is not None
    torch.testing.assert_close(torch.cat((first.log_momentum, second.log_momentum)), whole.log_momentum)


def test_half_lives_at_the_start():
    biases = torch.tensor(initial_biases(3, momentum=True), dtype=torch.float64).view(3, 1, 1, 1, 3)
    lives = [-math.log(2) / float(open_gates(level).log_forget) for level in biases]
    assert lives == pytest.approx([2**7, 2**11, 2**15])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["constant tokens", "open", "shut", "random extremes", "switching", "opposed values"])
def test_adversarial_inputs_stay_finite_over_32768_tokens(case, dtype):
    """Forward and backward; and bounded, since every token adds at most its value."""
    length, width = 32768, 16
    generator = torch.Generator().manual_seed(0)
    keys, values, reads = torch.randn(3, length, 1, 1, width, generator=generator)
    extremes = _EXTREME[torch.randint(0, 5, (length, 1, 1, 3), generator=generator)]
    logits = torch.full((length, 1, 1, 3), 0.0)
    match case:
        case "constant tokens":
            keys, values = keys[:1].expand_as(keys), values[:1].expand_as(values)
            logits[..., 1] = -1e4
        case "open":
            logits += torch.tensor([1e4, -1e4, 1e4])
        case "shut":
            logits += torch.tensor([-1e4, 1e4, -1e4])
        case "random extremes":
            logits = extremes
        case "switching":  # what resonates with momentum most: writes in bursts, then coasting
            burst = (torch.arange(length) % 20 < 3)[:, None, None]
            logits[..., 0] = torch.where(burst, 1e4, -1e4)
            logits[..., 1] = -1e4
            logits[..., 2] = torch.where(burst, -1e4, 1e4)
            keys = keys[:1].expand_as(keys)
        case "opposed values":
            keys = keys[:1].expand_as(keys)
            values = values[:1] * (1 - 2 * (torch.arange(length) % 2))[:, None, None, None]
            logits = extremes
    leaves = [x.to(dtype).clone().requires_grad_() for x in (reads, keys, values, logits)]
    gates = open_gates(leaves[3])
    (found,), state, _ = momentum_delta_rule(
        [leaves[0]], leaves[1], leaves[2], gates.log_forget, gates.log_momentum, gates.rate
    )
    found.float().square().mean().backward()
    assert bool(found.isfinite().all())
    assert float(state[:, :, 0].norm()) < 30 * float(values.norm(dim=-1).max()) * math.sqrt(width)
    for leaf in leaves:
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
