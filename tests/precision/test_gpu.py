"""Transformer Engine on a GPU against the emulation: what it quantises bit by bit, what it multiplies within 0.2 %.

Needs a GPU, Transformer Engine, and for three of the recipes a GPU that has them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from vishwamai_mp.precision import scaling
from vishwamai_mp.precision.formats import E4M3, E5M2
from vishwamai_mp.precision.fp8_linear import BlockScaling, CurrentScaling, MXScaling, Scaling
from vishwamai_mp.precision.nvfp4 import nvfp4_operand, rotate_tokens
from vishwamai_mp.precision.scaling import quantize_blocks, quantize_mx, scale_from_amax, scaled_operand

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch could use"),
]
_TOKENS, _IN, _OUT = 256, 512, 384


def engine(check: str) -> Any:
    """Transformer Engine, or skip with its reason."""
    te = pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    from transformer_engine.pytorch import fp8

    supported, reason = getattr(fp8, check)()
    if not supported:
        pytest.skip(reason)
    return te


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """bf16 numbers of uneven size, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(rows, columns // 32, generator=generator).exp2().repeat_interleave(32, 1)
    return (torch.randn(rows, columns, generator=generator) * size).bfloat16()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert torch.equal(ours.float(), theirs.detach().cpu().float())


@pytest.mark.parametrize("to", [E4M3, E5M2], ids=["E4M3", "E5M2"])
def test_current_scaling_operands(to):
    engine("check_fp8_support")
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    x = matrix(_TOKENS, _IN)
    dtype = tex.DType.kFloat8E4M3 if to is E4M3 else tex.DType.kFloat8E5M2
    theirs = Float8CurrentScalingQuantizer(dtype, device=torch.device("cuda"))(x.cuda())
    ours = scaled_operand(x, to, scale_from_amax(scaling.largest_absolute(x), to, x.dtype))
    assert ours.scale is not None
    assert_same(ours.scale.reciprocal().view(1), theirs._scale_inv)
    assert_same(ours.values, theirs._data.view(to.dtype))


def test_delayed_scaling_operands():
    engine("check_fp8_support")
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    x, scale = matrix(_TOKENS, _IN), torch.tensor([3.3])
    amax = torch.zeros(1, device="cuda")
    theirs = Float8Quantizer(scale.cuda(), amax, tex.DType.kFloat8E4M3)(x.cuda())
    assert_same(scaled_operand(x, E4M3, scale[0]).values, theirs._data.view(E4M3.dtype))
    assert amax.item() == x.abs().max().item()


@pytest.mark.parametrize("dimensions", [1, 2])
def test_block_operands(dimensions):
    engine("check_fp8_block_scaling_support")
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    x = matrix(_TOKENS, _IN)
    quantizer = Float8BlockQuantizer(
        tex.DType.kFloat8E4M3, rowwise=True, columnwise=True, force_pow_2_scales=True, block_scaling_dim=dimensions
    )
    theirs = quantizer(x.cuda())
    rows = 1 if dimensions == 1 else 128
    assert_same(quantize_blocks(x, E4M3, rows, 128).dequantize_(), theirs.dequantize(dtype=torch.float32))


def test_mx_operands():
    engine("check_mxfp8_support")
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    x = matrix(_TOKENS, _IN)
    theirs = MXFP8Quantizer(tex.DType.kFloat8E4M3)(x.cuda())
    assert_same(quantize_mx(x, E4M3, 1, 32).dequantize_(), theirs.dequantize(dtype=torch.float32))


@pytest.mark.parametrize("square", [False, True], ids=["rotated", "weights"])
def test_nvfp4_operands(square):
    engine("check_nvfp4_support")
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    x = matrix(_TOKENS, _IN)
    theirs = NVFP4Quantizer(with_rht=not square, with_post_rht_amax=not square, with_2d_quantization=square)(x.cuda())
    side = (x.t() if square else rotate_tokens(x).t()).contiguous()
    for given, codes, scales, amax in (
        (x, theirs._rowwise_data, theirs._rowwise_scale_inv, theirs._amax_rowwise),
        (side, theirs._columnwise_data, theirs._columnwise_scale_inv, theirs._amax_columnwise),
    ):
        rows, columns = given.shape
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        pairs = codes.cpu().view(rows, columns // 2).int()
        numbers = torch.stack((pairs & 15, pairs >> 4), -1).view(rows, columns)
        values = grid[numbers & 7] * (1 - 2 * (numbers >> 3))
        inverse = scales.cpu()[:rows, : columns // 16].contiguous().view(E4M3.dtype).float()
        assert_same(nvfp4_operand(given, 16 if square else 1, 16).values, values * inverse.repeat_interleave(16, 1))
        assert_same(scaling.largest_absolute(given).view(1), amax)


@pytest.mark.parametrize(
    ("recipe", "emulation", "check"),
    [
        ("Float8CurrentScaling", CurrentScaling, "check_fp8_support"),
        ("Float8BlockScaling", BlockScaling, "check_fp8_block_scaling_support"),
        ("MXFP8BlockScaling", MXScaling, "check_mxfp8_support"),
    ],
)
def test_a_whole_linear_layer(recipe, emulation, check):
    te = engine(check)
    import transformer_engine.common.recipe as recipes

    x, w, grad = matrix(_TOKENS, _IN), matrix(_OUT, _IN, 1), matrix(_TOKENS, _OUT, 2)
    layer = te.Linear(_IN, _OUT, bias=False, params_dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(w)
    given = x.cuda().requires_grad_()
    with te.fp8_autocast(enabled=True, fp8_recipe=getattr(recipes, recipe)()):
        y = layer(given)
    y.backward(grad.cuda())
    how: Scaling = emulation()
    ours = (
        scaling.multiply(how.quantize(x, "input", 1), how.quantize(w, "weight", 1).t(), torch.float32),
        scaling.multiply(how.quantize(grad, "gradient", 1), how.quantize(w, "weight", 0), torch.float32),
        scaling.multiply(how.quantize(grad, "gradient", 0).t(), how.quantize(x, "input", 0), torch.float32),
    )
    for one, other in zip(ours, (y, given.grad, layer.weight.grad), strict=True):
        assert other is not None
        off = (one - other.detach().cpu().float()).abs().max() / one.abs().max()
        # Half of bf16's last place, where theirs is rounded and ours not, and 0.2 % for the order of accumulation.
        assert off <= 2.0**-9 + 2e-3
