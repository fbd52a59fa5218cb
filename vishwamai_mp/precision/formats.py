"""The 8-bit (arXiv 2209.05433) and 4-bit (OCP Microscaling Formats 1.0) floating-point formats; rounding to them."""

from dataclasses import dataclass

import torch
from torch import Tensor

_EXPONENT_BITS = 0x7F800000  # of fp32
_FP32_MANTISSA = 23
CHANCE_BITS = 16  # of a random number that decides which way a number is rounded


@dataclass(frozen=True)
class Format:
    """An 8-bit or 4-bit floating-point format.

    Attributes:
        dtype: torch's name for it; E2M1's, which packs two numbers into a byte, only names it.
        maximum: the largest finite number.
        mantissa_bits: stored ones.
        minimum_exponent: of the smallest normal number; below it the grid is even.
    """

    dtype: torch.dtype
    maximum: float
    mantissa_bits: int
    minimum_exponent: int


E4M3 = Format(torch.float8_e4m3fn, 448.0, 3, -6)
E5M2 = Format(torch.float8_e5m2, 57344.0, 2, -14)
E2M1 = Format(torch.float4_e2m1fn_x2, 6.0, 1, 0)


def hybrid_format(role: str) -> Format:
    """The format of an operand ("input", "weight" or "gradient") where a tensor has one scale.

    Gradients need E5M2's range; blocks with scales of their own do not.
    """
    return E5M2 if role == "gradient" else E4M3


def round_to_format_(x: Tensor, to: Format) -> Tensor:
    """Round fp32 numbers, in place, to the nearest that `to` has, ties to even; beyond its range to the range's end.

    Equal to a saturating cast to `to.dtype` and back, in a third of the time on a CPU: a number's grid has the step
    2^(exponent − mantissa bits), and adding and subtracting 1.5 · 2^23 steps makes fp32's own rounding stop there.
    """
    x.clamp_(-to.maximum, to.maximum)  # torch's cast to E5M2 would overflow to infinity; GPUs saturate
    power = (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    shift = power.clamp_min_(2.0**to.minimum_exponent).mul_(1.5 * 2.0 ** (_FP32_MANTISSA - to.mantissa_bits))
    return x.add_(shift).sub_(shift)


def round_stochastically_(x: Tensor, to: Format, bits: Tensor) -> Tensor:
    """Round fp32 numbers, in place, to one of the two neighbours that `to` has: each the likelier, the nearer it is.

    So the mean of what a number is rounded to is the number, unless it lies beyond the format's range, to whose end it
    is rounded. What the format has stays as it is.

    Args:
        bits: random numbers below 2^16, of x's shape.
    """
    x.clamp_(-to.maximum, to.maximum)
    power = (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    step = power.clamp_min_(2.0**to.minimum_exponent).mul_(2.0**-to.mantissa_bits)
    # So few bits that adding them to a multiple of the step, which is to stay, never rounds up to the next.
    chance = bits.to(torch.float32).mul_(2.0**-CHANCE_BITS)
    return x.div_(step).add_(chance).floor_().mul_(step)
