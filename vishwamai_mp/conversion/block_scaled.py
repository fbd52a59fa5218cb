"""FP8 weights in blocks of 128 × 128 with a scale each, as transformers' fine-grained FP8 reads them.

The numbers are those that `precision: fp8_blockwise` multiplies with: E4M3, the scale a power of two.
Shapes: M rows, N columns.
"""

import torch
from torch import Tensor

from vishwamai_mp.conversion.mapping import Part

BLOCK = 128
_ROWS_AT_ONCE = 8 * BLOCK


def is_block_scaled(part: Part) -> bool:
    """Whether a tensor is a layer's matrix that whole blocks make up; embeddings and the output layer are none."""
    return part.name.endswith("_proj.weight") and all(length % BLOCK == 0 for length in part.shape)


def quantized(matrix_MN: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 numbers (M, N), and fp32 (M / 128, N / 128) what to multiply those of a block with."""
    from vishwamai_mp.precision.formats import E4M3  # here: the room imports megatron-core, which takes seconds
    from vishwamai_mp.precision.scaling import quantize_blocks

    numbers, scales = [], []
    for rows in matrix_MN.split(_ROWS_AT_ONCE):
        blocks = quantize_blocks(rows, E4M3, BLOCK, BLOCK)
        numbers.append(blocks.codes.view(rows.shape).to(E4M3.dtype))
        scales.append(blocks.scale_inverse[:, 0, :, 0])
    return torch.cat(numbers), torch.cat(scales)


def dequantized(
    numbers_MN: Tensor, scales: Tensor, block: tuple[int, int] = (BLOCK, BLOCK), skipped: int = 0
) -> Tensor:
    """The matrix that they mean, fp32 (M, N).

    Args:
        numbers_MN: E4M3.
        scales: of every block that a number lies in, in rows and columns; the last ones may reach beyond the numbers.
        block: rows and columns of one.
        skipped: rows of the first block that lie before the numbers.
    """
    rows, columns = numbers_MN.shape
    each = scales.float().repeat_interleave(block[0], 0)[skipped : skipped + rows]
    return numbers_MN.float() * each.repeat_interleave(block[1], 1)[:, :columns]
