"""Blocks of rows small enough that what is computed of one stays in a CPU's caches until it is used."""

from torch import Tensor

from vishwamai_mp.runtime import is_accelerator


def row_blocks(rows_NW: Tensor) -> list[slice]:
    """Slices of the rows, each a megabyte in fp32; on GPUs a quarter of a gigabyte, for their memory's sake only."""
    count = max(1, 2 ** (26 if is_accelerator(rows_NW) else 18) // max(1, rows_NW.shape[-1]))
    return [slice(first, first + count) for first in range(0, len(rows_NW), count)]
