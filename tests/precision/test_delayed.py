"""Delayed scaling: the rule, and which passes count."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vishwamai_mp.precision.delayed import DelayedScaling, update_scales_
from vishwamai_mp.precision.fp8_linear import DelayedLayerScaling, emulate_fp8

_WIDTH = 32


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_rule_by_hand(algorithm, length):
    generator = torch.Generator().manual_seed(4)
    history, scale = torch.zeros(length, 1), torch.ones(1)
    by_hand, known = 1.0, [0.0] * length
    for step in range(30):
        amax = [torch.rand(1, generator=generator).item() * 4, 0.0, math.inf, 1e-45][step % 4 if step > 6 else 0]
        history[0] = known[0] = amax
        used = max(known) if algorithm == "max" else known[0]
        if 0 < used < math.inf:
            by_hand = min((torch.tensor(448.0) / torch.tensor(used)).item(), torch.finfo(torch.float32).max)
        known = [0.0, *known[2:], known[0]] if length > 1 else [0.0]
        update_scales_(history, scale, 448.0, algorithm)
        assert scale.item() == by_hand
        assert history[:, 0].tolist() == torch.tensor(known).tolist()


class _Linear(nn.Module):
    """The part of a parallel linear layer that the emulation needs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        weight = torch.randn(_WIDTH, _WIDTH, generator=torch.Generator().manual_seed(seed)) / 4
        self.weight = nn.Parameter(weight.bfloat16())

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        raise AssertionError("the emulation takes its place")

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x, self.weight)


class _Decoder(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Linear(seed) for seed in range(2)])
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True) if self.recompute else layer(x)
        return x


def decoder(recompute: bool = False, group: Any = None) -> tuple[_Decoder, DelayedScaling]:
    model = _Decoder(recompute)
    layers = list(model.layers)
    shared = DelayedScaling(model, layers, group or SimpleNamespace(size=lambda: 1), 4, "max")
    for index, layer in enumerate(layers):
        emulate_fp8(layer, DelayedLayerScaling(shared, index))
    return model, shared


def batch(seed: int) -> Tensor:
    x = torch.randn(8, 2, _WIDTH, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    return x.bfloat16().requires_grad_()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_scales_follow_the_pass_before():
    model, shared = decoder()
    x = batch(0)
    first = model(x)
    layer: Any = model.layers[0]
    last: Any = model.layers[1]
    amax = x.abs().max().float(), layer.weight.abs().max().float()
    assert layer.fp8_scale[:2].tolist() == [(torch.tensor(448.0) / value).item() for value in amax]
    assert layer.fp8_scale[2] == 1
    first.sum().backward()
    gradient = torch.ones(16, _WIDTH).bfloat16() @ last.weight
    assert layer.fp8_scale[2].item() == pytest.approx(57344 / gradient.abs().max().item(), rel=0.1)
    assert last.fp8_scale[2] == 57344
    assert layer.fp8_amax_history[:, 0].tolist() == [0.0, 0.0, 0.0, amax[0]]
    assert not torch.equal(model(batch(0)), first)  # scaled by another number
    assert shared.history.shape == (2, 4, 3)
    assert all(buffer.is_contiguous() for buffer in model.buffers())  # checkpoints exchange them as they lie


def test_evaluation_changes_nothing():
    model, shared = decoder()
    model(batch(0)).sum().backward()
    before = shared.history.clone(), shared.scale.clone()
    model.eval()
    with torch.no_grad():
        model(batch(3))
    model(batch(2)).sum().backward()
    assert torch.equal(shared.history, before[0])
    assert torch.equal(shared.scale, before[1])


def sequential(model: _Decoder) -> None:
    for seed in range(3):
        model(batch(seed)).sum().backward()


def one_forward_one_backward(model: _Decoder) -> None:
    """As a pipeline stage runs its passes: a second forward pass before the first backward pass."""
    waiting = [model(batch(0))]
    for seed in range(1, 3):
        waiting.append(model(batch(seed)))
        waiting.pop(0).sum().backward()
    waiting.pop().sum().backward()


@pytest.mark.parametrize("schedule", [sequential, one_forward_one_backward])
def test_recomputation_sees_the_scales_of_its_own_pass(schedule: Callable[[_Decoder], None]):
    (plain, state), (recomputing, again) = decoder(), decoder(recompute=True)
    schedule(plain)
    schedule(recomputing)
    assert torch.equal(state.history, again.history)
    assert torch.equal(state.scale, again.scale)
    for one, other in zip(gradients(plain), gradients(recomputing), strict=True):
        assert torch.equal(one, other)


def test_the_state_is_part_of_a_state_dict():
    (model, shared), (other, copy) = decoder(), decoder()
    sequential(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(copy.scale, shared.scale)
    assert torch.equal(copy.history, shared.history)
    assert torch.equal(other(batch(5)), model(batch(5)))


def reduced(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs in a worker: state after a pass over a batch that only this rank has."""
    model, shared = decoder(group=dist.group.WORLD)
    model(batch(seed + dist.get_rank())).sum().backward()
    return shared.history, shared.scale, batch(seed + dist.get_rank()).abs().max()


def test_all_ranks_have_the_largest_amax(workers):
    (history, scale, amax), (other, other_scale, other_amax) = workers.run(reduced, 2, 0)
    assert amax != other_amax
    assert torch.equal(history, other)
    assert torch.equal(scale, other_scale)
    assert history[0, -1, 0] == max(amax, other_amax)
