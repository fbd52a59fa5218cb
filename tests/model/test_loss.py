"""Vocabulary-parallel cross-entropy against torch's, on logits that no rank holds whole."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.workers import WorkerPool
from vishwamai_mp.model.loss import vocab_parallel_cross_entropy

_VOCABULARY, _PADDED, _SHAPE = 130, 256, (5, 3)  # of four shards, the third has 2 real ids and the last has none


def whole_logits(scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with padding, targets, and each token's weight in the sum."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(*_SHAPE, _PADDED, generator=generator) * scale
    targets = torch.randint(_VOCABULARY, _SHAPE, generator=generator)
    targets[0, 0], targets[0, 1], targets[0, 2] = 0, 128, _VOCABULARY - 1  # borders of shards
    return logits.to(dtype), targets, torch.randn(_SHAPE, generator=generator)


def loss_and_gradient(scale: float, dtype: torch.dtype, padding: float | None) -> tuple[Tensor, Tensor]:
    """Runs in a worker: the losses, and this rank's columns of the logits' gradient."""
    logits, targets, weights = whole_logits(scale, dtype)
    if padding is not None:
        logits[..., _VOCABULARY:] = padding
    group = dist.group.WORLD
    assert group is not None
    local = logits.chunk(group.size(), -1)[group.rank()].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(local, targets, _VOCABULARY, group)
    (losses * weights).sum().backward()
    assert local.grad is not None
    return losses.detach(), local.grad


def parallel(
    workers: WorkerPool, size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, padding: float | None = None
) -> tuple[Tensor, Tensor]:
    results = workers.run(loss_and_gradient, size, scale, dtype, padding)
    for losses, _ in results:
        assert torch.equal(losses, results[0][0])
    return results[0][0], torch.cat([gradient for _, gradient in results], -1)


def oracle(scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, targets, weights = whole_logits(scale, dtype)
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits[..., :_VOCABULARY].flatten(0, 1), targets.flatten(), reduction="none").view(_SHAPE)
    (losses * weights).sum().backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_loss_and_gradient_are_torchs(workers, size, scale):
    """Also where single exponentials would overflow."""
    losses, gradient = parallel(workers, size, scale)
    expected, expected_gradient = oracle(scale, torch.float32)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    # The probabilities are exponentials of differences: a logit's last bit is a relative error of its size.
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=2e-6 * max(1.0, scale))


@pytest.mark.parametrize("size", [1, 4])
def test_16_bit_logits_are_computed_with_in_fp32(workers, size):
    losses, gradient = parallel(workers, size, dtype=torch.bfloat16)
    expected, expected_gradient = oracle(1.0, torch.bfloat16)
    assert (losses.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_padding_is_not_seen(workers, size):
    plain, plain_gradient = parallel(workers, size)
    for padding in (1e4, float("inf"), float("nan")):
        losses, gradient = parallel(workers, size, padding=padding)
        assert torch.equal(losses, plain)
        assert torch.equal(gradient, plain_gradient)
    assert not plain_gradient[..., _VOCABULARY:].any()
    assert plain_gradient[..., :_VOCABULARY].all()
