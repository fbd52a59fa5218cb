"""Sums over what programs of other kernels left behind, as a Triton kernel; `triton_kernels.sum_parts` launches it."""

import triton
import triton.language as tl


@triton.jit
def columns(parts, out, rows, width, RB: tl.constexpr, BLOCK: tl.constexpr):
    """(R, N) fp32 → (N,), in whatever dtype; in the same order every time. Grid: (⌈N / BLOCK⌉,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    found = tl.zeros((RB, BLOCK), tl.float32)
    for first in range(0, rows, RB):
        row = first + tl.arange(0, RB)
        place = row.to(tl.int64)[:, None] * width + at[None, :]
        found += tl.load(parts + place, (row < rows)[:, None] & inside[None, :], 0.0)
    tl.store(out + at, tl.sum(found, 0), inside)
