"""Rounding to FP8 grids, against torch's own casts."""

import pytest
import torch
from torch import Tensor

from vishwamai_mp.precision.formats import E4M3, E5M2, round_to_format_


def every_bf16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def fp32_near_the_grid(count: int = 500_000) -> Tensor:
    """Numbers around ties and halves of steps, and arbitrary bit patterns."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    ties = torch.randint(0, 2**12, (count,), generator=generator).float() * 2.0 ** torch.randint(
        -20, 8, (count,), generator=generator
    )
    nudged = torch.nextafter(ties, torch.full_like(ties, torch.inf))
    return torch.cat((bits.view(torch.float32), ties, nudged, -nudged))


@pytest.mark.parametrize("to", [E4M3, E5M2], ids=["E4M3", "E5M2"])
@pytest.mark.parametrize("numbers", [every_bf16, fp32_near_the_grid])
def test_it_is_the_saturating_cast(to, numbers):
    x = numbers()
    expected = x.clamp(-to.maximum, to.maximum).to(to.dtype).float()
    rounded = round_to_format_(x.clone(), to)
    assert torch.equal(rounded.nan_to_num(nan=-1e9), expected.nan_to_num(nan=-1e9))


@pytest.mark.parametrize("to", [E4M3, E5M2], ids=["E4M3", "E5M2"])
def test_formats_are_torchs(to):
    limits = torch.finfo(to.dtype)
    assert to.maximum == limits.max
    assert 2.0**to.minimum_exponent == limits.smallest_normal
    assert 2.0**-to.mantissa_bits == limits.eps


def test_beyond_the_range_lies_its_end():
    x = torch.tensor([1e6, -1e6, torch.inf, -torch.inf, 449.0])
    assert round_to_format_(x.clone(), E4M3).tolist() == [448, -448, 448, -448, 448]
    assert round_to_format_(x.clone(), E5M2)[:4].tolist() == [57344, -57344, 57344, -57344]
