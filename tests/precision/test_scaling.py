"""Scales and block scales against numpy's division and exact fractions; operands against their definition."""

import math
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from vishwamai_mp.precision import scaling
from vishwamai_mp.precision.formats import E4M3, E5M2, Format
from vishwamai_mp.precision.scaling import Operand, e8m0_from_amax, multiply, quantize_blocks, quantize_mx

_FORMATS = {"E4M3": E4M3, "E5M2": E5M2}


def positive_bf16() -> Tensor:
    return torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("name", _FORMATS)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_scale_is_the_rounded_quotient(name, power_of_two):
    """Of every positive bf16 amax, by numpy's IEEE division; a reciprocal and a product would miss a fourth of them."""
    to, amax = _FORMATS[name], positive_bf16()
    with np.errstate(over="ignore"):
        quotient = np.float32(to.maximum) / amax.float().numpy()
    quotient = np.where(np.isinf(quotient), np.float32(torch.finfo(torch.bfloat16).max), quotient)
    if power_of_two:
        quotient = np.ldexp(np.float32(1), np.frexp(quotient)[1] - 1)
    ours = scaling.scale_from_amax(amax, to, torch.bfloat16, power_of_two)
    assert np.array_equal(ours.numpy(), quotient)
    if not power_of_two:
        reciprocal = amax.float().reciprocal() * to.maximum
        assert 0.1 < (reciprocal != ours).float().mean() < 0.5


def test_without_a_usable_amax_the_scale_is_one():
    amax = torch.tensor([0.0, torch.inf, torch.nan])
    assert scaling.scale_from_amax(amax, E4M3, torch.float32).tolist() == [1.0, 1.0, 1.0]
    assert scaling.scale_from_amax(amax, E4M3, torch.float32, power_of_two=True).tolist() == [1.0, 1.0, 1.0]


def exponent_by_hand(amax: np.float32, to: Format) -> int:
    """ceil(log2(amax / maximum)) + 127, the quotient rounded to fp32 as the hardware does; exact from there."""
    ratio = Fraction(float(np.float32(amax) * np.float32(1.0 / to.maximum)))
    if ratio == 0:
        return 0
    exponent = math.floor(math.log2(ratio)) - 1
    while Fraction(2) ** exponent < ratio:
        exponent += 1
    return min(max(exponent + 127, 0), 254)


@pytest.mark.parametrize("name", _FORMATS)
def test_mx_exponents_are_rounded_up(name):
    to = _FORMATS[name]
    generator = torch.Generator().manual_seed(7)
    some = torch.randint(1, 0x7F800000, (3000,), dtype=torch.int32, generator=generator).view(torch.float32)
    edges = torch.exp2(torch.arange(-126, 128).float()) * to.maximum / 256
    amax = torch.cat((positive_bf16()[::11].float(), some, edges[edges.isfinite()]))
    expected = [exponent_by_hand(np.float32(value), to) for value in amax.tolist()]
    assert e8m0_from_amax(amax, to).tolist() == expected
    assert e8m0_from_amax(torch.tensor([0.0, torch.inf, torch.nan]), to).tolist() == [0, 254, 255]


@pytest.mark.parametrize("name", _FORMATS)
def test_mx_exponents_differ_from_the_exact_rule_by_the_rounded_quotient_only(name):
    """amax · fp32(1 / maximum) may reach a power of two that amax / maximum just misses, or miss one it reaches."""
    to, amax = _FORMATS[name], positive_bf16().float()
    exact = [max(math.ceil(math.log2(value / to.maximum)) + 127, 0) for value in amax.double().tolist()]
    apart = e8m0_from_amax(amax, to) - torch.tensor(exact)
    assert apart.abs().max() <= 1
    ratio = amax[apart != 0].double() / to.maximum
    off = (ratio.log2() - ratio.log2().round()).abs()
    assert (off < 1e-6).all()
    assert len(off) < 300  # at most one amax per power of two


def uneven(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = torch.randn(rows, columns, generator=generator).mul(3).exp2()
    return (torch.randn(rows, columns, generator=generator) * size).bfloat16()


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (128, 1), (128, 128)])
def test_blocks_by_hand(rows, columns):
    """Ragged edges included: 200 × 300 leaves parts of blocks."""
    x = uneven(200, 300)
    x[:, 0] = 0.0
    expected = torch.zeros(200, 300)
    for top in range(0, 200, rows):
        for left in range(0, 300, columns):
            block = x[top : top + rows, left : left + columns].double()
            amax = block.abs().max().item()
            scale = 2.0 ** math.floor(math.log2(448 / amax)) if amax else 1.0
            codes = (block * scale).float().to(torch.float8_e4m3fn).double()
            expected[top : top + rows, left : left + columns] = (codes / scale).float()
    assert torch.equal(quantize_blocks(x, E4M3, rows, columns).dequantize_(), expected)


def test_a_weight_in_blocks_is_rounded_to_itself():
    """So a checkpoint may have it in bf16, whatever the scales: they are powers of two."""
    weight = quantize_blocks(uneven(200, 300), E4M3, 128, 128).dequantize_()
    assert torch.equal(weight.bfloat16().float(), weight)
    assert torch.equal(quantize_blocks(weight, E4M3, 128, 128).dequantize_(), weight)


@pytest.mark.parametrize("along", [0, 1])
def test_mx_blocks_by_hand(along):
    x = uneven(70, 90)
    rows, columns = (32, 1) if along == 0 else (1, 32)
    expected = torch.zeros(70, 90)
    for top in range(0, 70, rows):
        for left in range(0, 90, columns):
            block = x[top : top + rows, left : left + columns].double()
            scale = 2.0 ** (exponent_by_hand(np.float32(block.abs().max().item()), E4M3) - 127)
            codes = (block / scale).float().to(torch.float8_e4m3fn).double()
            expected[top : top + rows, left : left + columns] = (codes * scale).float()
    assert torch.equal(quantize_mx(x, E4M3, rows, columns).dequantize_(), expected)


def test_the_two_directions_of_a_block_recipe_differ():
    x = uneven(128, 128)
    assert not torch.equal(quantize_mx(x, E4M3, 1, 32).dequantize_(), quantize_mx(x, E4M3, 32, 1).dequantize_())


@pytest.mark.parametrize("native", [False, True])
def test_a_product_is_accumulated_exactly_and_rounded_once(native):
    """Sums of few products of FP8 numbers are exact in fp32, so the order of summation does not matter."""
    if native and not scaling.multiplies_natively(torch.bfloat16):
        pytest.skip("this CPU multiplies no bf16 matrices")
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randint(-16, 17, shape, generator=generator).float() for shape in ((40, 60), (60, 50)))
    scales = torch.tensor(4.0), torch.tensor(0.5)  # powers of two: exact in both ways
    with mock.patch.object(scaling, "multiplies_natively", return_value=native):
        dtype = scaling.working_dtype(torch.bfloat16)
        product = multiply(Operand(left.to(dtype), scales[0]), Operand(right.to(dtype), scales[1]), torch.bfloat16)
    assert dtype == (torch.bfloat16 if native else torch.float32)
    assert torch.equal(product, ((left.double() @ right.double()) / 2).bfloat16())


def test_a_scale_acts_before_the_rounding():
    """Rounding the sum first, and then the scaled one, would change every third number."""
    if not scaling.multiplies_natively(torch.bfloat16):
        pytest.skip("this CPU multiplies no bf16 matrices")
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randint(-16, 17, shape, generator=generator).bfloat16() for shape in ((40, 60), (60, 50)))
    scale = torch.tensor(3.3)
    exact = (left.double() @ right.double()) / scale.double()
    product = multiply(Operand(left, scale), Operand(right), torch.bfloat16)
    assert torch.equal(product, exact.bfloat16())
    assert ((left @ right) / scale.bfloat16() != product).float().mean() > 0.1
