"""Operands of NVFP4 products: E2M1 numbers in blocks of 16 with E4M3 scales, and one fp32 scale per tensor.

The rules are those of Transformer Engine's `NVFP4BlockScaling` (arXiv 2509.25149): weights have one scale per 16 × 16
numbers; inputs and gradients one per 16 along the sum, and where the sum is over tokens they are rotated first by a
Hadamard matrix with signs, which cancels in the product; gradients are rounded stochastically. Shapes: M rows, N
columns.
"""

import torch
from torch import Tensor

from vishwamai_mp.precision.formats import E2M1, E4M3, round_stochastically_, round_to_format_
from vishwamai_mp.precision.rounding_bits import RoundingBits
from vishwamai_mp.precision.scaling import (
    Operand,
    Quantized,
    block_amax,
    in_blocks,
    largest_absolute,
    slabs,
    working_dtype,
)

BLOCK = 16
_LARGEST = E4M3.maximum * E2M1.maximum  # what a tensor's largest number becomes under the tensor's scale
# Transformer Engine's signs of the rows of the Hadamard matrix, drawn once and for all: a bit is set where one is −1.
# Bits in a number, for a GPU would wait for a list of them to come from the host.
_NEGATIVE = sum(1 << row for row in (3, 5, 6, 7, 8, 9, 10, 12, 14, 15))


def tensor_scale(amax: Tensor) -> Tensor:
    """What numbers of at most `amax` are multiplied with, so that block scales fill E4M3's range. fp32.

    An infinite amax gives zero, so that what such a tensor is multiplied with becomes infinite or NaN and is noticed.
    """
    amax = amax.float()
    return torch.div(amax.new_full((), _LARGEST), amax).clamp_max_(torch.finfo(torch.float32).max)


def block_scales(amax: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of blocks: what their numbers are multiplied with, and the E4M3 numbers kept. fp32, of amax's shape.

    Args:
        amax: the blocks' largest absolute values.
        scale: the tensor's (`tensor_scale`).
    """
    greatest = torch.finfo(torch.float32).max
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # Transformer Engine's kernel has a reciprocal and a product where a division would round once.
    inverse = (amax * (scale * scale.new_full((), E2M1.maximum).reciprocal())).clamp_max_(greatest)
    inverse = round_to_format_(inverse, E4M3)
    return (inverse * scale.reciprocal()).reciprocal().clamp_max_(greatest), inverse


def quantize_nvfp4(x_MN: Tensor, scale: Tensor, rows: int, columns: int, bits_MN: Tensor | None = None) -> Quantized:
    """Blocks of E2M1 numbers with E4M3 scales.

    Args:
        x_MN: the matrix, or some rows of it.
        scale: the whole matrix's (`tensor_scale`).
        rows: of a block.
        columns: of a block.
        bits_MN: round stochastically with these random bits (None: to the nearest, ties to even).
    """
    blocks = in_blocks(x_MN, rows, columns)
    encode, decode = block_scales(block_amax(blocks), scale)
    blocks.mul_(encode)
    if bits_MN is None:
        codes = round_to_format_(blocks, E2M1)
    else:
        codes = round_stochastically_(blocks, E2M1, bits_MN.view(blocks.shape))
    return Quantized(codes, decode, (x_MN.shape[0], x_MN.shape[1]))


def nvfp4_operand(x_MN: Tensor, rows: int, columns: int, bits: RoundingBits | None = None) -> Operand:
    """A matrix in blocks of `rows` × `columns`.

    Its values are E2M1 numbers times their E4M3 scales, 6 bits of precision, which bf16 has.

    Args:
        bits: round stochastically with these (None: to the nearest).
    """
    scale = tensor_scale(largest_absolute(x_MN))
    values = torch.empty(x_MN.shape, dtype=working_dtype(x_MN.dtype), device=x_MN.device)
    found = []
    for slab in slabs(x_MN, rows):
        quantized = quantize_nvfp4(x_MN[slab], scale, rows, columns, None if bits is None else bits.of_rows(slab))
        values[slab] = quantized.dequantize_()
        found.append(quantized.scale_inverse)
    inverses = torch.cat(found)
    return Operand(values, scale, block_scales=torch.where(inverses == 0, 1.0, scale / inverses))


def rotate_tokens(x_MN: Tensor) -> Tensor:
    """Each 16 rows rotated: Hᵀ x of a Hadamard matrix with signs; in the data type of x, as a GPU rounds them."""
    rotation = _rotation(x_MN.device)
    rotated = torch.empty_like(x_MN)
    for slab in slabs(x_MN, BLOCK):
        groups = x_MN[slab].float().view(-1, BLOCK, x_MN.shape[1])
        rotated[slab] = torch.matmul(rotation.t(), groups).view(-1, x_MN.shape[1])
    return rotated


def _rotation(device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix of size 16 with signed rows, orthogonal."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < BLOCK:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = 1 - 2 * (_NEGATIVE >> torch.arange(BLOCK, device=device) & 1)
    return signs[:, None] * matrix / BLOCK**0.5
