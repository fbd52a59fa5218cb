"""16-bit linear layers on hardware without 16-bit products: widened, multiplied in fp32, rounded once."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.precision.sharded_linear import run_sharded
from vishwamai_mp.precision import PrecisionPolicy, linears, use_transformer_engine
from vishwamai_mp.precision.linears import _Fp32Linear

_16_BIT = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENS, _ROWS, _IN, _OUT = 6, 3, 40, 24


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, B, I), w (O, I) and the gradient of y (T, B, O)."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(_TOKENS, _ROWS, _IN), (_OUT, _IN), (_TOKENS, _ROWS, _OUT)]
    x, w, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, w, grad


def oracle(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dw as torch's own fp32 linear gives them, rounded at the end."""
    x, w, grad = (tensor.float() for tensor in operands(dtype))
    x.requires_grad_(), w.requires_grad_()
    y = F.linear(x, w)
    y.backward(grad)
    assert x.grad is not None
    assert w.grad is not None
    return y.detach().to(dtype), x.grad.to(dtype), w.grad.to(dtype)


def ours(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, w, grad = operands(dtype)
    x.requires_grad_(), w.requires_grad_()
    y = _Fp32Linear.apply(x, w, False, False, None)
    y.backward(grad)
    assert x.grad is not None
    assert w.grad is not None
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("name", _16_BIT)
def test_it_is_the_fp32_product_rounded_once(name):
    for one, other in zip(ours(_16_BIT[name]), oracle(_16_BIT[name]), strict=True):
        assert_same_rounding(one, other)


@pytest.mark.parametrize("name", _16_BIT)
def test_it_is_within_half_a_last_place_of_the_exact_product(name):
    """float64 as the judge: accumulating in 16 bits would be many times further off."""
    dtype = _16_BIT[name]
    x, w, grad = (tensor.double() for tensor in operands(dtype))
    exact = (x @ w.t(), grad @ w, grad.flatten(0, 1).t() @ x.flatten(0, 1))
    for one, other in zip(ours(dtype), exact, strict=True):
        assert ((one.double() - other).abs() <= torch.finfo(dtype).eps / 2 * other.abs() + 1e-5).all()


class _MatrixProducts(TorchDispatchMode):
    """Notes the data types of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.mkldnn._linear_pointwise)
        if func.overloadpacket in products:
            self.dtypes += [argument.dtype for argument in args if isinstance(argument, Tensor)]
        return func(*args, **(kwargs or {}))


def test_no_16_bit_product_is_left_to_the_slow_fallback():
    with _MatrixProducts() as products:
        ours(torch.bfloat16)
    assert products.dtypes == [torch.float32] * 6  # y, dx and dw


def layers_with_our_arithmetic(precision: str, native: bool) -> list[str]:
    """Runs in a worker: kinds of parallel linears in a small model that are widened, on hardware that is `native`."""
    from tests.model.builds import build

    with mock.patch.object(linears, "multiplies_natively", lambda dtype: native or dtype == torch.float32):
        _, _, (model,) = build(f"precision={precision}")
    implementations = {name: getattr(module, "_forward_impl", None) for name, module in model.named_modules()}
    return sorted(
        {
            name.split(".")[-1]
            for name, implementation in implementations.items()
            if getattr(implementation, "args", ())[:1] == (linears._Fp32Linear.apply,)
        }
    )


_ALL = ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv", "output_layer"]


@pytest.mark.parametrize(
    ("precision", "native", "widened"),
    [("bf16", False, _ALL), ("fp16", False, _ALL), ("fp32", True, _ALL), ("bf16", True, []), ("fp16", True, [])],
)
def test_all_linears_multiply_in_fp32_exactly_where_the_hardware_does_not_in_less(workers, precision, native, widened):
    assert workers.run(layers_with_our_arithmetic, 1, precision, native)[0] == widened


def sharded(kind: str, dtype: torch.dtype, sequence_parallel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Runs in a worker: this rank's y, dx, dw of one megatron-core linear with our arithmetic."""

    def widen(layer: Any) -> None:
        with mock.patch.object(linears, "multiplies_natively", return_value=False):
            linears.use_arithmetic(layer, PrecisionPolicy("bf16", dtype))

    return run_sharded(kind, operands(dtype), widen, sequence_parallel)


@pytest.mark.parametrize("name", _16_BIT)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP2", "TP2 SP"])
def test_column_parallel_equals_one_process(workers, name, sequence_parallel):
    dtype = _16_BIT[name]
    y, dx, dw = oracle(dtype)
    ranks = workers.run(sharded, 2, "column", dtype, sequence_parallel)
    assert torch.equal(torch.cat([rank[0] for rank in ranks], -1), y)
    assert torch.equal(torch.cat([rank[2] for rank in ranks], 0), dw)
    if sequence_parallel:
        whole = torch.cat([rank[1] for rank in ranks], 0)
    else:
        assert torch.equal(ranks[0][1], ranks[1][1])
        whole = ranks[0][1]
    assert_sum_of_two_roundings(whole, dx)


@pytest.mark.parametrize("name", _16_BIT)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP2", "TP2 SP"])
def test_row_parallel_equals_one_process(workers, name, sequence_parallel):
    dtype = _16_BIT[name]
    y, dx, dw = oracle(dtype)
    ranks = workers.run(sharded, 2, "row", dtype, sequence_parallel)
    whole = torch.cat([rank[0] for rank in ranks], 0) if sequence_parallel else ranks[0][0]
    assert_sum_of_two_roundings(whole, y)
    assert_same_rounding(torch.cat([rank[1] for rank in ranks], -1), dx)
    assert_same_rounding(torch.cat([rank[2] for rank in ranks], 1), dw)


def assert_same_rounding(ours: Tensor, exact: Tensor) -> None:
    """Equal, but where fp32 sums of another order lie on both sides of the middle between two 16-bit numbers.

    That is one element in thousands; sums in 16 bits, or products rounded twice, differ in many, and by more.
    """
    assert ours.dtype == exact.dtype
    torch.testing.assert_close(ours, exact, rtol=torch.finfo(exact.dtype).eps, atol=1e-4 * float(exact.abs().max()))
    assert (ours != exact).float().mean() < 0.01


def assert_sum_of_two_roundings(ours: Tensor, exact: Tensor) -> None:
    """Each rank rounds its part, of the whole's order of size, and their sum is rounded again."""
    assert ours.dtype == exact.dtype
    size = float(exact.float().abs().max())
    assert (ours.float() - exact.float()).abs().max() <= 2 * torch.finfo(exact.dtype).eps * size
    assert exact.float().abs().max() > 1


def test_frozen_weights_get_no_gradient():
    x, w, grad = operands(torch.bfloat16)
    x.requires_grad_()
    _Fp32Linear.apply(x, w, False, False, None).backward(grad)
    assert w.grad is None
    assert x.grad is not None
    assert torch.equal(x.grad, oracle(torch.bfloat16)[1])


@pytest.mark.parametrize(
    ("precision", "dtype", "scales"), [("fp32", torch.float32, False), ("fp16", torch.float16, True)]
)
def test_policies(precision, dtype, scales):
    policy = PrecisionPolicy.of(precision)
    assert (policy.compute, policy.scales_loss) == (dtype, scales)


@pytest.mark.parametrize(
    ("device", "installed", "expected"), [("cpu", True, False), ("cuda", False, False), ("cuda", True, True)]
)
def test_transformer_engine_needs_a_gpu_and_the_package(device, installed, expected):
    with (
        mock.patch("vishwamai_mp.runtime.fused_layers.device", return_value=torch.device(device)),
        mock.patch("importlib.util.find_spec", return_value=object() if installed else None),
    ):
        assert use_transformer_engine(PrecisionPolicy.of("bf16")) is expected
