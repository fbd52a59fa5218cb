"""The memory's Triton kernels on a GPU against torch's operators there. Needs a GPU, and Triton, which torch brings."""

import pytest
import torch

from tests.neural_memory.kernel_programs import memory_of, of_memory
from tests.neural_memory.test_delta_rule import everything, furthest, tokens
from vishwamai_mp.neural_memory.delta_rule import momentum_delta_rule
from vishwamai_mp.neural_memory.delta_rule_on_gpu import supports

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch could use"),
]


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize(("width", "reads", "documents"), [(128, 2, True), (64, 1, False), (40, 2, True)])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_results_and_gradients_are_those_of_torch(monkeypatch, dtype, apart, width, reads, documents, momentum):
    """In terms of each tensor's largest entry: fp32 by three TF32 products each, 16 bits by one."""
    inputs = tokens(300, heads=4, width=width, values=width, reads=reads, momentum=momentum, dtype=dtype)
    inputs = {
        name: [x.cuda() for x in value] if isinstance(value, list) else value if value is None else value.cuda()
        for name, value in inputs.items()
    }
    starts = (torch.arange(300) % 70 == 69)[:, None].cuda().expand(300, inputs["keys"].shape[1]) if documents else None
    assert supports(inputs["reads"], inputs["keys"], inputs["values"])
    ours = everything(momentum_delta_rule, inputs, starts, None)
    monkeypatch.setenv("VISHWAMAI_TRITON", "0")
    assert not supports(inputs["reads"], inputs["keys"], inputs["values"])
    assert furthest(ours, everything(momentum_delta_rule, inputs, starts, None)) < apart


@pytest.mark.parametrize(
    ("levels", "momentum", "documents", "carried"), [(3, True, True, True), (1, False, False, False)]
)
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_a_whole_memory_is_that_of_torch(monkeypatch, dtype, apart, levels, momentum, documents, carried):
    """Torch's operators round to 16 bits between convolution, mix and norm; the kernels do not."""
    module = memory_of(2, 64, levels, momentum).to("cuda", dtype)
    case = (300, 2, 2, 64, levels, momentum, documents, carried)
    ours = of_memory(module, case)
    monkeypatch.setenv("VISHWAMAI_TRITON", "0")
    assert furthest(ours, of_memory(module, case)) < apart
