"""RMSNorm by blocks of rows against torch's in float64: outputs and both gradients."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.kernel_visits import needs_triton, said_by
from vishwamai_mp.model import norm as norm_module
from vishwamai_mp.model.norm import RMSNorm, supports


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(norm_module, "row_blocks", lambda rows: [slice(i, i + 3) for i in range(0, len(rows), 3)])


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_it_is_rms_norm(small_blocks, dtype, tolerance, zero_centered):
    generator = torch.Generator().manual_seed(0)
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=True, layernorm_zero_centered_gamma=zero_centered)
    module = RMSNorm(config, 16, eps=1e-3)
    assert (module.weight + zero_centered).eq(1).all()
    assert getattr(module.weight, "sequence_parallel", False)
    module.weight.data.copy_(torch.randn(16, generator=generator))
    x = torch.randn(4, 2, 16, generator=generator).to(dtype).transpose(0, 1).requires_grad_()  # not contiguous
    gradient = torch.randn(2, 4, 16, generator=generator).to(dtype)
    ours = module(x)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, module.weight))
    exact = F.rms_norm(exact_x, (16,), exact_weight + int(zero_centered), 1e-3)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    before = x.detach().clone(), gradient.clone()
    ours.backward(gradient)
    exact.backward(gradient.double())
    for one, other in ((x, exact_x), (module.weight, exact_weight)):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=2 * tolerance, atol=2 * tolerance)
    assert torch.equal(x, before[0])  # nothing is overwritten
    assert torch.equal(gradient, before[1])


@needs_triton
def test_the_interpreter_finds_the_results_and_gradients_of_the_cpu():
    found = said_by(Path(__file__).with_name("norm_kernel_programs.py"), "interpret")
    assert len(found) == 2
    assert max(found.values()) < 1e-5, found


def test_which_cases_kernels_take(monkeypatch):
    """The launches of a step on the simulated accelerator say that they are taken there."""
    x, weight = torch.empty(2, 8192, device="meta"), torch.empty(8192, device="meta")
    assert not supports(x, weight)
    monkeypatch.setattr("vishwamai_mp.runtime.triton_kernels.is_accelerator", lambda tensor: True)
    assert supports(x, weight)
    assert not supports(x.new_empty(2, 8193), weight)
    assert not supports(x[:0], weight)
    assert not supports(x.double(), weight)
