"""The matrix products of CPUs, by MKL or by oneDNN: which is faster is a matter of the CPU (see `choices.py`).

torch gives fp32 matrices to MKL. On AMD's CPUs that reaches half of oneDNN's speed (EPYC with AVX-512: 200 and 440
GFLOP/s with two threads); on Intel's both multiply equally fast, but MKL takes transposed operands as they lie, which
oneDNN first copies. oneDNN is asked by the one operator through which torch offers it. Where the CPU has no hardware
for 16-bit types, they are widened.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vishwamai_mp.runtime.choices import Choice

_FEW, _SKINNY = 8, 64  # rows: fewer than the one, up to the other; beyond, products are those of training
_CACHED = 2**26  # bytes; more than these of weights are not found in a CPU's cache again
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


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of fp32, bf16 or fp16 in hardware.

    One without AVX512-BF16 or AMX falls back to loops of torch's for 16-bit types: as fast as fp32 with one row, some
    hundred times slower with thousands.
    """
    if dtype == torch.float32:
        return True
    mkldnn = torch.ops.mkldnn
    return mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported()


def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of a decoding batch, (N, I) and (O, I) → (N, O), which may be a view of (O, N).

    Summed in fp32 and rounded once to the type of x.
    """
    narrow = weight.dtype.itemsize == 2
    if narrow and (not x.is_cpu or cpu_multiplies(weight.dtype)):
        return F.linear(x, weight)
    if narrow and len(x) < _FEW and x.dtype == weight.dtype:
        return (_one_narrow_row if len(x) == 1 else _few_narrow_rows)(x, weight)
    return _widened(x, weight)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """A B of each pair of matrices, (…, M, K) and (…, K, N) → (…, M, N), without a gradient.

    Args:
        out: where the result goes; not A or B.
    """
    return _products(a, b, out) if _large(a, b) else torch.matmul(a, b, out=out)


def add_product(into: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """into + scale · A B, in place; shapes as of `product`."""
    return _added_products(into, a, b, scale) if _large(a, b) else _baddbmm(into, a, b, scale)


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    return _skinny_linear_fp32(*(y.to(torch.promote_types(y.dtype, torch.float32)) for y in (x, weight))).to(x.dtype)


def _skinny_linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    rows = len(x)
    if rows > _SKINNY or not _uses_onednn(x):
        return linear_fp32(x, weight)
    return (_one_row if rows == 1 else _few_rows if rows < _FEW else _some_rows)(x, weight)


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


def _one_by_one(rows: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, ...]]:
    """Some rows times one weight after the other. A decoding step comes back to a weight when it has read all others:
    what is fastest with a weight in the CPU's cache says nothing about it."""
    x, weight = (drawn.to(dtype) for drawn in _drawn((rows, 512), (2048, 512)))
    weights = weight.repeat(_CACHED // weight.nbytes, 1, 1)
    return [(x, weight) for weight in weights]


_linear = Choice(
    "linear",
    {"onednn": _onednn, "mkl": lambda x, weight: x @ weight.t()},
    lambda: [_drawn((2048, 512), (1536, 512))],
)
_input_gradient = Choice(
    "input_gradient",
    {"onednn": lambda grad, weight: _onednn(grad, weight.t()), "mkl": torch.matmul},
    lambda: [_drawn((2048, 1536), (1536, 512))],
)
_weight_gradient = Choice(
    "weight_gradient",
    {"onednn": lambda grad, x: _onednn(grad.t(), x.t()), "mkl": lambda grad, x: grad.t() @ x},
    lambda: [_drawn((2048, 1536), (2048, 512))],
)
# oneDNN lays its second matrix out anew at each call. Swapped, that is the smaller one, and weights are read once. MKL
# reads them once as well, but on AMD's CPUs takes up to three times as long over a few rows as over a few columns.
_SKINNY_WAYS = {
    "onednn_swapped": lambda x, weight: _onednn(weight, x).t(),
    "onednn": _onednn,
    "mkl": lambda x, weight: x @ weight.t(),
    "mkl_swapped": lambda x, weight: (weight @ x.t()).t(),
}
_one_row = Choice("one_row", _SKINNY_WAYS, lambda: _one_by_one(1))
_few_rows = Choice("few_rows", _SKINNY_WAYS, lambda: _one_by_one(4))
_some_rows = Choice("some_rows", _SKINNY_WAYS, lambda: _one_by_one(16))
# Of 16-bit types without the hardware; fp16 as bf16, which torch multiplies by the same loops.
_NARROW_WAYS: dict[str, Callable[..., Tensor]] = {"widened": _widened, "torch": F.linear}
_one_narrow_row, _few_narrow_rows = (
    Choice(name, _NARROW_WAYS, partial(_one_by_one, rows, torch.bfloat16))
    for name, rows in (("one_narrow_row", 1), ("few_narrow_rows", 4))
)
_products = Choice(
    "products",
    {"onednn": _products_by_onednn, "mkl": lambda a, b, out: torch.matmul(a, b, out=out)},
    lambda: [(*_drawn((8, 128, 128), (8, 128, 128)), None)],
)
_added_products = Choice(
    "added_products",
    {"onednn": _added_by_onednn, "mkl": _baddbmm},
    lambda: [(*_drawn((8, 128, 128), (8, 128, 128), (8, 128, 128)), 1.0)],
)
