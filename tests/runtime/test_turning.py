"""Rotary positions on CPUs beside megatron-core's function."""

import inspect

import pytest
import torch
from torch import Tensor

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from megatron.core.models.common.embeddings import rope_utils

from vishwamai_mp.runtime.turning import turned

_own = rope_utils._apply_rotary_pos_emb_bshd
_megatron = inspect.unwrap(_own)


def results(function, x: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    x = x.detach().transpose(0, 1).requires_grad_()  # not contiguous
    out = function(x, *args, **options)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def test_it_stands_in_place_of_megatron_cores():
    assert _own is not _megatron


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 24])  # the whole head, or its first numbers
def test_as_megatron_core_within_rounding(dtype, width):
    x = (3 * torch.randn(2, 7, 3, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    angles = torch.linspace(0, 9, 7)[:, None, None, None] * torch.arange(width) % 5
    ours, theirs = (results(one, x, angles, mscale=1.25) for one in (_own, _megatron))
    tolerance = 8 * torch.finfo(dtype).eps  # of numbers up to 14, products and sums rounded apart there
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * float(other.abs().max()))


def test_gradient_is_that_of_the_function():
    x = torch.randn(3, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    cosine, sine = torch.rand(2, 3, 1, 1, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: turned(x, cosine, sine), (x,))


def test_other_rules_stay_megatron_cores():
    x, angles = torch.randn(2, 3, 1, 8), torch.rand(3, 1, 1, 8)
    ours, theirs = (results(one, x, angles, rotary_interleaved=True)[0] for one in (_own, _megatron))
    assert torch.equal(ours, theirs)
