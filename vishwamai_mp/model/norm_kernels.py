"""RMSNorm as Triton kernels: the arithmetic of `norm.py`, in one launch forward and one backward.

`norm.py` launches them. This file imports Triton; it is imported where kernels run.

Shapes: N tokens, D width (padded to DP).
"""

import triton
import triton.language as tl


@triton.jit
def norm(x, weight, out, inverse, width, epsilon, offset, DP: tl.constexpr):
    """`out` (N, D) and 1/√(mean x² + ε), (N,) fp32. Grid: (N,)."""
    row = tl.program_id(0)
    columns = tl.arange(0, DP)
    inside = columns < width
    at = row.to(tl.int64) * width + columns
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    scale = tl.load(weight + columns, inside, 0.0).to(tl.float32) + offset
    found = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + epsilon)
    tl.store(out + at, value * found * scale, inside)
    tl.store(inverse + row, found)


@triton.jit
def norm_back(
    x, weight, inverse, grad, beside, d_x, parts, rows, width, offset, DP: tl.constexpr, BESIDE: tl.constexpr
):  # fmt: skip
    """The gradient of x, and sums over every P-th row of that of the weight, (P, D) fp32. Grid: (P,).

    BESIDE: the gradient of x as it came in beside its norm, `beside` (N, D), is added."""
    columns = tl.arange(0, DP)
    inside = columns < width
    scale = tl.load(weight + columns, inside, 0.0).to(tl.float32) + offset
    d_weight = tl.zeros((DP,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * width + columns
        found = tl.load(inverse + row)
        normed = tl.load(x + at, inside, 0.0).to(tl.float32) * found
        own = tl.load(grad + at, inside, 0.0).to(tl.float32)
        d_weight += normed * own
        own *= scale
        total = (own - normed * (tl.sum(normed * own, 0) / width)) * found
        if BESIDE:
            total += tl.load(beside + at, inside, 0.0).to(tl.float32)
        tl.store(d_x + at, total, inside)
    tl.store(parts + tl.program_id(0) * width + columns, d_weight, inside)
