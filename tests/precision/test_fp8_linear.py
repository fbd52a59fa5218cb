"""FP8 linear layers, whole and split over ranks, against products of operands rounded by torch's own casts."""

import types
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.precision.sharded_linear import run_sharded
from vishwamai_mp.precision import scaling
from vishwamai_mp.precision.fp8_linear import BlockScaling, CurrentScaling, MXScaling, _Fp8Linear, emulate_fp8

_RECIPES: dict[str, Any] = {"current": CurrentScaling, "blockwise": BlockScaling, "mx": MXScaling}
_TOKENS, _ROWS, _IN, _OUT = 128, 2, 256, 512
Rounded = tuple[Tensor, Tensor, Tensor]


def operands() -> Rounded:
    """x (T, B, I), w (O, I) and the gradient of y (T, B, O) in bf16.

    Tokens, and rows of w, are of very different sizes, and the gradient makes up for it: power-of-two scales change
    only what falls below the format's normal numbers, so a block that lies the wrong way would not show otherwise.
    """
    generator = torch.Generator().manual_seed(5)
    tokens, rows = (
        torch.randint(-12, 1, shape, generator=generator).float().exp2() for shape in ((_TOKENS, _ROWS, 1), (_OUT, 1))
    )
    x, w, grad = (
        torch.randn(shape, generator=generator)
        for shape in ((_TOKENS, _ROWS, _IN), (_OUT, _IN), (_TOKENS, _ROWS, _OUT))
    )
    return (x * tokens).bfloat16(), (w * rows).bfloat16(), (grad / tokens / rows.t() * 1e-6).bfloat16()


def rounded(recipe: str, x: Tensor, role: str, along: int) -> Tensor:
    """What a tensor core would see of a 2-D operand of a product that sums along `along`."""
    x = x.double()
    if recipe == "current":
        dtype = torch.float8_e5m2 if role == "gradient" else torch.float8_e4m3fn
        scale = (torch.tensor(torch.finfo(dtype).max) / x.abs().max().float()).double()
        return (x.float() * scale.float()).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(
            dtype
        ).double() / scale
    size = 32 if recipe == "mx" else 128
    square = recipe == "blockwise" and role == "weight"
    rows, columns = (size, size) if square else (1, size) if along == 1 else (size, 1)
    blocks = x.view(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    exponent = (448 / blocks.abs().amax((1, 3), keepdim=True)).log2().floor()
    codes = (blocks * exponent.exp2()).float().to(torch.float8_e4m3fn).double()
    return (codes / exponent.exp2()).view(x.shape)


def expected(recipe: str, x: Tensor, w: Tensor, grad: Tensor) -> Rounded:
    """y, dx, dw in double precision."""
    x2, g2 = x.flatten(0, 1), grad.flatten(0, 1)
    y = rounded(recipe, x2, "input", 1) @ rounded(recipe, w, "weight", 1).t()
    dx = rounded(recipe, g2, "gradient", 1) @ rounded(recipe, w, "weight", 0)
    dw = rounded(recipe, g2, "gradient", 0).t() @ rounded(recipe, x2, "input", 0)
    return y.view(*x.shape[:2], -1), dx.view(x.shape), dw


def assert_rounded_once(ours: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """Within `roundings` halves of bf16's last place; a wrong scale or direction is off by ten times that."""
    assert ours.dtype == torch.bfloat16
    bound = roundings * (2.0**-8 * exact.abs() + 2.0**-18 * exact.abs().max())
    assert ((ours.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("recipe", _RECIPES)
@pytest.mark.parametrize("native", [False, True], ids=["in fp32", "in bf16"])
def test_products_of_rounded_operands(recipe, native):
    if native and not scaling.multiplies_natively(torch.bfloat16):
        pytest.skip("this CPU multiplies no bf16 matrices")
    x, w, grad = operands()
    exact = expected(recipe, x, w, grad)
    layer = types.SimpleNamespace(fp8_scaling=_RECIPES[recipe](), fp8_observer=None)
    x.requires_grad_(), w.requires_grad_()
    with mock.patch.object(scaling, "multiplies_natively", return_value=native):
        y = _Fp8Linear.apply(x, w, layer, False, False, None)
        y.backward(grad)
    assert x.grad is not None
    assert w.grad is not None
    for ours, other in zip((y.detach(), x.grad, w.grad), exact, strict=True):
        assert_rounded_once(ours, other)
    plain = x.detach().double() @ w.detach().double().t()
    assert (exact[0] - plain).abs().max() > 20 * 2.0**-8 * plain.abs().mean()  # the rounding is there to be seen


def test_frozen_weights_get_no_gradient():
    x, w, grad = operands()
    layer = types.SimpleNamespace(fp8_scaling=MXScaling(), fp8_observer=None)
    x.requires_grad_()
    _Fp8Linear.apply(x, w, layer, False, False, None).backward(grad)
    assert w.grad is None
    assert x.grad is not None


def sharded(kind: str, recipe: str, sequence_parallel: bool) -> Rounded:
    """Runs in a worker: this rank's y, dx, dw of one megatron-core linear with FP8 arithmetic."""
    return run_sharded(kind, operands(), lambda layer: emulate_fp8(layer, _RECIPES[recipe]()), sequence_parallel)


@pytest.mark.parametrize("recipe", _RECIPES)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP2", "TP2 SP"])
def test_column_parallel(workers, recipe, sequence_parallel):
    """The whole sequence has one input: its scale too. Weights and gradients have a scale per rank."""
    x, w, grad = operands()
    shards = [expected(recipe, x, w.chunk(2, 0)[rank], grad.chunk(2, -1)[rank]) for rank in range(2)]
    ranks = workers.run(sharded, 2, "column", recipe, sequence_parallel)
    for (y, _, dw), (exact_y, _, exact_dw) in zip(ranks, shards, strict=True):
        assert_rounded_once(y, exact_y)
        assert_rounded_once(dw, exact_dw)
    dx = torch.cat([rank[1] for rank in ranks], 0) if sequence_parallel else ranks[0][1]
    assert_sum(dx, [shard[1] for shard in shards])


@pytest.mark.parametrize("recipe", _RECIPES)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP2", "TP2 SP"])
def test_row_parallel(workers, recipe, sequence_parallel):
    """The gradient is whole on each rank, gathered over the sequence; inputs and weights have a scale per rank."""
    x, w, grad = operands()
    shards = [expected(recipe, x.chunk(2, -1)[rank], w.chunk(2, 1)[rank], grad) for rank in range(2)]
    ranks = workers.run(sharded, 2, "row", recipe, sequence_parallel)
    for (_, dx, dw), (_, exact_dx, exact_dw) in zip(ranks, shards, strict=True):
        assert_rounded_once(dx, exact_dx)
        assert_rounded_once(dw, exact_dw)
    y = torch.cat([rank[0] for rank in ranks], 0) if sequence_parallel else ranks[0][0]
    assert_sum(y, [shard[0] for shard in shards])


def assert_sum(ours: Tensor, parts: list[Tensor]) -> None:
    """Each rank rounds its part, and their sum is rounded again."""
    bound = 2.0**-8 * (sum(part.abs() for part in parts) + sum(parts).abs())  # type: ignore[union-attr]
    assert ((ours.double() - sum(parts)).abs() <= bound + 2.0**-18 * bound.max()).all()


@pytest.mark.parametrize("recipe", ["blockwise", "mx"])
@pytest.mark.parametrize("role", ["input", "weight", "gradient"])
@pytest.mark.parametrize("along", [0, 1])
def test_block_scales_do_not_know_the_layout(recipe, role, along):
    """Shards that are whole blocks are rounded as they would be inside the whole, whichever side is split."""
    matrix, recipe = operands()[0].flatten(0, 1), _RECIPES[recipe]()
    whole = recipe.quantize(matrix, role, along).values
    for side in (0, 1):
        shards = [recipe.quantize(shard, role, along).values for shard in matrix.chunk(2, side)]
        assert torch.equal(torch.cat(shards, side), whole)


def test_one_scale_per_tensor_knows_the_layout():
    matrix, recipe = operands()[0].flatten(0, 1), CurrentScaling()
    scales = []
    for shard in (matrix, *matrix.chunk(2, 0)):
        scale = recipe.quantize(shard, "weight", 1).scale
        assert scale is not None
        scales.append(scale.item())
    assert scales[1] != scales[2]
    assert scales[0] == min(scales[1:])
