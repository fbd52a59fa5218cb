"""fp32 products of CPUs against products in fp64, on either side of each switch between libraries."""

import pytest
import torch

from vishwamai_mp.runtime import choices
from vishwamai_mp.runtime.products import add_product, linear_fp32, product, skinny_linear


@pytest.mark.parametrize("rows", [1, 7, 8, 16, 64, 65])
def test_linear(rows):
    random = torch.Generator().manual_seed(rows)
    weight = torch.randn(96, 48, generator=random)
    for x in (torch.randn(rows, 48, generator=random), torch.randn(48, rows, generator=random).t()):
        exact = (x.double() @ weight.double().t()).float()
        torch.testing.assert_close(linear_fp32(x, weight), exact)
        torch.testing.assert_close(skinny_linear(x, weight), exact)
        torch.testing.assert_close(linear_fp32(x.contiguous().view(rows, 1, 48), weight)[:, 0], exact)


@pytest.mark.parametrize("shape", [(2, 3, 8, 16, 24), (2, 1, 128, 128, 128)])
def test_products_of_many_matrices(shape):
    *batch, rows, inner, columns = shape
    random = torch.Generator().manual_seed(rows)
    a, b = torch.randn(*batch, rows, inner, generator=random), torch.randn(*batch, inner, columns, generator=random)
    into = torch.randn(*batch, rows, columns, generator=random)
    exact = a.double() @ b.double()
    torch.testing.assert_close(product(a, b), exact.float(), rtol=1e-5, atol=1e-4)
    expected = (into.double() - 0.5 * exact).float()
    torch.testing.assert_close(add_product(into, a, b, scale=-0.5), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("way", ["widened", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 7, 8, 65])
def test_narrow_products_are_rounded_once(rows, dtype, way, monkeypatch):
    """Also where the CPU has the hardware: none may sum in 16 bits."""
    monkeypatch.setattr(choices, "_in_force", {"one_narrow_row": way, "few_narrow_rows": way})
    random = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 512, generator=random).to(dtype) for n in (rows, 96))
    exact = x.double() @ weight.double().t()
    out = skinny_linear(x, weight)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-4)
