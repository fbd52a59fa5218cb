"""Scaling factors of FP8 operands, and the operands as a tensor core sees them.

Rules are those of Transformer Engine's kernels. Shapes: M rows, N columns.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vishwamai_mp.precision.formats import Format, round_to_format_
from vishwamai_mp.runtime import is_accelerator, multiplies_natively

_FP32_MANTISSA_BITS = 23
_SIGN_AND_EXPONENT = -(1 << _FP32_MANTISSA_BITS)  # of an fp32 number's bits
_E8M0_LARGEST, _E8M0_NAN = 254, 255
_SLAB = 1 << 19  # numbers that are rounded at once


def scale_from_amax(amax: Tensor, to: Format, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """What to multiply numbers of at most `amax` with, so that they fill the range of `to`. fp32, of amax's shape.

    Args:
        amax: largest absolute values; where it is zero, infinite or NaN the scale is 1.
        to: the target format.
        dtype: of what is scaled: its largest number is the largest scale.
        power_of_two: round the scale down to one.
    """
    amax = amax.float()
    # A true division: `448.0 / amax` would be a reciprocal and a product, one last place off every fourth time.
    scale = torch.div(amax.new_full((), to.maximum), amax)
    scale = torch.where(torch.isinf(scale), torch.finfo(dtype).max, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & _SIGN_AND_EXPONENT).view(torch.float32)
    return torch.where((amax == 0) | ~torch.isfinite(amax), torch.ones_like(scale), scale)


def e8m0_from_amax(amax: Tensor, to: Format) -> Tensor:
    """Exponents of MX block scales, biased by 127: the smallest power of two that is at least amax / to.maximum.

    OCP Microscaling Formats 1.0 leaves the choice of scale open; rounding up is what NVIDIA's Blackwell does
    (arXiv 2506.08027, section 3), so that no number exceeds the format's range. 255 stands for NaN.
    """
    amax = amax.float()
    ratio = amax * amax.new_full((), 1.0 / to.maximum)
    bits = ratio.view(torch.int32)
    exponent, mantissa = bits >> _FP32_MANTISSA_BITS, bits & ~_SIGN_AND_EXPONENT
    # 2^-127, the smallest scale, is half of fp32's smallest normal number.
    small = (exponent == 0) & (mantissa <= 1 << (_FP32_MANTISSA_BITS - 1))
    exponent = exponent + ((mantissa > 0) & (exponent < _E8M0_LARGEST) & ~small).int()
    exponent = torch.where(torch.isinf(ratio), _E8M0_LARGEST, exponent)
    return torch.where(torch.isnan(ratio), _E8M0_NAN, exponent)


@dataclass(frozen=True)
class Quantized:
    """A matrix in blocks that share a scale.

    Attributes:
        codes: fp32 numbers of the format's grid, (M / rows, rows, N / columns, columns), zero-padded.
        scale_inverse: fp32, (M / rows, 1, N / columns, 1): what codes are multiplied with to mean the matrix.
        shape: (M, N), without padding.
    """

    codes: Tensor
    scale_inverse: Tensor
    shape: tuple[int, int]

    def dequantize_(self) -> Tensor:
        """The matrix of rounded numbers, fp32 (M, N). Uses up the codes."""
        rows, columns = self.codes.shape[:2].numel(), self.codes.shape[2:].numel()
        return self.codes.mul_(self.scale_inverse).view(rows, columns)[: self.shape[0], : self.shape[1]]


def quantize_blocks(x_MN: Tensor, to: Format, rows: int, columns: int) -> Quantized:
    """Blocks of `rows` × `columns`, each with a power-of-two scale (`fp8_blockwise`)."""
    blocks = in_blocks(x_MN, rows, columns)
    scale = scale_from_amax(block_amax(blocks), to, x_MN.dtype, power_of_two=True)
    return Quantized(round_to_format_(blocks.mul_(scale), to), scale.reciprocal(), _shape(x_MN))


def quantize_mx(x_MN: Tensor, to: Format, rows: int, columns: int) -> Quantized:
    """Blocks of 32 numbers (1 × 32 or 32 × 1), each with an E8M0 scale (`fp8_mx`)."""
    blocks = in_blocks(x_MN, rows, columns)
    exponent = e8m0_from_amax(block_amax(blocks), to)
    codes = round_to_format_(blocks.mul_(_power_of_two(_E8M0_LARGEST - exponent)), to)
    return Quantized(codes, _power_of_two(exponent), _shape(x_MN))


def largest_absolute(x: Tensor) -> Tensor:
    """The amax of a tensor, without a copy of it."""
    return torch.maximum(x.amax(), -x.amin())


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def in_blocks(x_MN: Tensor, rows: int, columns: int) -> Tensor:
    """An fp32 copy of the matrix, padded with zeros, (M / rows, rows, N / columns, columns)."""
    height, width = x_MN.shape
    below, right = -height % rows, -width % columns
    x = F.pad(x_MN.float(), (0, right, 0, below)) if below or right else x_MN.to(torch.float32, copy=True)
    return x.contiguous().view((height + below) // rows, rows, (width + right) // columns, columns)


def block_amax(blocks: Tensor) -> Tensor:
    return blocks.abs().amax((1, 3), keepdim=True)


def _power_of_two(biased: Tensor) -> Tensor:
    """2^(biased − 127) in fp32; 255 is NaN, and 2^-127 lies below fp32's normal numbers."""
    value = (biased << _FP32_MANTISSA_BITS).view(torch.float32)
    value = torch.where(biased <= 0, 2.0**-127, value)
    return torch.where(biased == _E8M0_NAN, torch.nan, value)


Quantizer = Callable[[Tensor, Format, int, int], Quantized]


@dataclass(frozen=True)
class Operand:
    """One side of a matrix product.

    Attributes:
        values: 2-D; of the data type that this machine multiplies (`working_dtype`).
        scale: fp32 scalar; the values are this many times what they mean. None: they are what they mean.
        block_scales: what the numbers of each block were multiplied with before they were rounded, for reports. The
            values have it taken out again, which rounds nothing.
    """

    values: Tensor
    scale: Tensor | None = None
    block_scales: Tensor | None = None

    def t(self) -> "Operand":
        return Operand(self.values.t(), self.scale)

    def dequantize(self) -> Tensor:
        """What the values mean, in fp32."""
        return self.values.float() if self.scale is None else self.values.float() * self.scale.reciprocal()


def scaled_operand(x_MN: Tensor, to: Format, scale: Tensor) -> Operand:
    """A matrix with one scale."""
    values = torch.empty(x_MN.shape, dtype=working_dtype(x_MN.dtype), device=x_MN.device)
    for slab in slabs(x_MN, 1):
        values[slab] = round_to_format_(x_MN[slab].to(torch.float32, copy=True).mul_(scale), to)
    return Operand(values, scale)


def block_operand(quantize: Quantizer, x_MN: Tensor, to: Format, rows: int, columns: int) -> Operand:
    """A matrix in blocks of `rows` × `columns`, each with its power-of-two scale."""
    values = torch.empty(x_MN.shape, dtype=working_dtype(x_MN.dtype), device=x_MN.device)
    inverses = []
    for slab in slabs(x_MN, rows):
        quantized = quantize(x_MN[slab], to, rows, columns)
        values[slab] = quantized.dequantize_()
        inverses.append(quantized.scale_inverse)
    return Operand(values, block_scales=torch.cat(inverses).reciprocal())


def slabs(x_MN: Tensor, rows: int) -> Iterator[slice]:
    """Bands of whole blocks; on an accelerator one. Buffers of 2 MiB are reused by malloc and fit the cache; larger
    ones are mapped anew by the operating system for each operation, which takes longer than the operation."""
    height = max(x_MN.shape[0] if is_accelerator(x_MN.device) else _SLAB // x_MN.shape[1] // rows * rows, rows)
    for top in range(0, x_MN.shape[0], height):
        yield slice(top, top + height)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to multiply in. Rounded numbers are bf16 numbers too, so bf16 where the hardware has it loses nothing."""
    return dtype if dtype == torch.bfloat16 and multiplies_natively(dtype) else torch.float32


def multiply(left: Operand, right: Operand, dtype: torch.dtype) -> Tensor:
    """left · right, accumulated in fp32 and rounded once to `dtype`.

    In bf16 the scales are divided out of the accumulated sum, as a GPU does. In fp32 they are divided out of the
    operands, as in Transformer Engine's own reference, which is rounded by that a little more.
    """
    if left.values.dtype != dtype:
        return (left.dequantize() @ right.dequantize()).to(dtype)
    inverses = [operand.scale.reciprocal() for operand in (left, right) if operand.scale is not None]
    if inverses and is_accelerator(left.values.device):  # which is not to wait for the host to read a scale
        product = torch.mm(left.values, right.values, out_dtype=torch.float32)
        return product.mul_(math.prod(inverses)).to(dtype)
    factor = math.prod(inverse.item() for inverse in inverses)
    unused = left.values.new_empty(right.values.shape[1])
    return torch.addmm(unused, left.values, right.values, beta=0, alpha=factor)  # it acts before the rounding
