"""The fp32 matrix products of CPUs, by MKL or by oneDNN: which is faster is a matter of the CPU (see `choices.py`).

torch gives fp32 matrices to MKL. On AMD's CPUs that reaches half of oneDNN's speed (EPYC with AVX-512: 200 and 440
GFLOP/s with two threads); on Intel's both multiply equally fast, but MKL takes transposed operands as they lie, which
oneDNN first copies. oneDNN is asked by the one operator through which torch offers it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vishwamai_mp.runtime.choices import Choice

_SKINNY = range(8, 65)  # rows; with fewer or more, changing sides is no faster
_WORTH_A_CALL = 2**21  # multiplications; below, one batched call of MKL is as fast as several of oneDNN


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of fp32 (or fp64) tensors, (…, I) and (O, I) → (…, O)."""
    return _linear(x, weight) if _uses_onednn(x) else x @ weight.t()


def input_gradient_fp32(grad: Tensor, weight: Tensor) -> Tensor:
    """dY W, (…, O) and (O, I) → (…, I): the gradient of x in `linear_fp32`."""
    return _input_gradient(grad, weight) if _uses_onednn(grad) else grad @ weight


def weight_gradient_fp32(grad: Tensor, x: Tensor) -> Tensor:
    """dYᵀ X, (N, O) and (N, I) → (O, I): the gradient of W in `linear_fp32`."""
    return _weight_gradient(grad, x) if _uses_onednn(grad) else grad.t() @ x


def skinny_linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """`linear_fp32` of a decoding batch, (N, I) and (O, I) → (N, O), which may be a view of (O, N)."""
    if x.shape[0] in _SKINNY and _uses_onednn(x):
        return _skinny_linear(x, weight)
    return linear_fp32(x, weight)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """A B of each pair of matrices, (…, M, K) and (…, K, N) → (…, M, N), without a gradient.

    Args:
        out: where the result goes; not A or B.
    """
    return _products(a, b, out) if _large(a, b) else torch.matmul(a, b, out=out)


def add_product(into: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """into + scale · A B, in place; shapes as of `product`."""
    return _added_products(into, a, b, scale) if _large(a, b) else _baddbmm(into, a, b, scale)


def _uses_onednn(x: Tensor) -> bool:
    onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return onednn and x.is_cpu and x.dtype == torch.float32


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _large(a: Tensor, b: Tensor) -> bool:
    return a.shape[-2] * a.shape[-1] * b.shape[-1] >= _WORTH_A_CALL and _uses_onednn(a)


def _products_by_onednn(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        out = a.new_empty(*a.shape[:-1], b.shape[-1])
    for part, left, right in _pairs(out, a, b):
        part.copy_(_onednn(left, right.t()))
    return out


def _baddbmm(into: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    into.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3), alpha=scale)
    return into


def _added_by_onednn(into: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    for part, left, right in _pairs(into, a, b):
        part.add_(_onednn(left, right.t()), alpha=scale)
    return into


def _pairs(*batches: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The matrices of each, one after the other."""
    return zip(*(batch.flatten(0, -3).unbind() for batch in batches), strict=True)


def _drawn(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=random) for shape in shapes)


_linear = Choice(
    "linear",
    {"onednn": _onednn, "mkl": lambda x, weight: x @ weight.t()},
    lambda: _drawn((2048, 512), (1536, 512)),
)
_input_gradient = Choice(
    "input_gradient",
    {"onednn": lambda grad, weight: _onednn(grad, weight.t()), "mkl": torch.matmul},
    lambda: _drawn((2048, 1536), (1536, 512)),
)
_weight_gradient = Choice(
    "weight_gradient",
    {"onednn": lambda grad, x: _onednn(grad.t(), x.t()), "mkl": lambda grad, x: grad.t() @ x},
    lambda: _drawn((2048, 1536), (2048, 512)),
)
_skinny_linear = Choice(
    "skinny_linear",
    {
        # oneDNN lays its second matrix out anew at each call. That is the smaller one here, so weights are read once.
        "onednn_swapped": lambda x, weight: _onednn(weight, x).t(),
        "onednn": _onednn,
        "mkl": lambda x, weight: x @ weight.t(),
        "mkl_swapped": lambda x, weight: (weight @ x.t()).t(),
    },
    lambda: _drawn((16, 512), (8192, 512)),
)
_products = Choice(
    "products",
    {"onednn": _products_by_onednn, "mkl": lambda a, b, out: torch.matmul(a, b, out=out)},
    lambda: (*_drawn((8, 128, 128), (8, 128, 128)), None),
)
_added_products = Choice(
    "added_products",
    {"onednn": _added_by_onednn, "mkl": _baddbmm},
    lambda: (*_drawn((8, 128, 128), (8, 128, 128), (8, 128, 128)), 1.0),
)
