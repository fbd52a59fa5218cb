"""The fp32 matrix products of CPUs.

torch gives fp32 matrices to MKL, which on AMD's CPUs reaches half of oneDNN's speed (EPYC with AVX-512: 200 and 440
GFLOP/s with two threads). oneDNN is asked by the one operator through which torch offers it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_SKINNY = range(8, 65)  # rows; with fewer or more, changing sides is no faster
_WORTH_A_CALL = 2**21  # multiplications; below, one batched call of MKL is as fast as several of oneDNN


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of fp32 (or fp64) tensors, (…, I) and (O, I) → (…, O)."""
    return _onednn(x, weight) if _uses_onednn(x) else x @ weight.t()


def skinny_linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """`linear_fp32` of a decoding batch, (N, I) and (O, I) → (N, O), which may be a view of (O, N).

    oneDNN lays its second matrix out anew at each call. That is the smaller one here, so weights are read once.
    """
    if x.shape[0] in _SKINNY and _uses_onednn(x):
        return _onednn(weight, x).t()
    return linear_fp32(x, weight)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """A B of each pair of matrices, (…, M, K) and (…, K, N) → (…, M, N), without a gradient.

    Args:
        out: where the result goes; not A or B.
    """
    if not _large(a, b):
        return torch.matmul(a, b, out=out)
    if out is None:
        out = a.new_empty(*a.shape[:-1], b.shape[-1])
    for part, left, right in _pairs(out, a, b):
        part.copy_(_onednn(left, right.t()))
    return out


def add_product(into: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """into + scale · A B, in place; shapes as of `product`."""
    if not _large(a, b):
        into.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3), alpha=scale)
        return into
    for part, left, right in _pairs(into, a, b):
        part.add_(_onednn(left, right.t()), alpha=scale)
    return into


def _uses_onednn(x: Tensor) -> bool:
    onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return onednn and x.is_cpu and x.dtype == torch.float32


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _large(a: Tensor, b: Tensor) -> bool:
    return a.shape[-2] * a.shape[-1] * b.shape[-1] >= _WORTH_A_CALL and _uses_onednn(a)


def _pairs(*batches: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The matrices of each, one after the other."""
    return zip(*(batch.flatten(0, -3).unbind() for batch in batches), strict=True)
