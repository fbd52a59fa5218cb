"""The cache's Triton kernels on a GPU against torch's operators there. Needs a GPU, and Triton, which torch brings."""

import pytest
import torch

from tests.cache_augmentation.cache_kernel_programs import cache_of, of_cache, of_reading
from tests.neural_memory.test_delta_rule import furthest
from vishwamai_mp.cache_augmentation.read import _Read
from vishwamai_mp.cache_augmentation.reading_on_gpu import ReadOnGpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch could use"),
]


@pytest.mark.parametrize("case", [(4, 6, 64, 40, 8, 128, 12), (2, 3, 100, 20, 8, 512, 0), (3, 2, 33, 9, 3, 24, 4)])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_results_and_gradients_are_those_of_torch(dtype, apart, case):
    """In terms of each tensor's largest entry: fp32 by three TF32 products each, 16 bits by one."""
    ours, theirs = (of_reading(way, case, dtype, "cuda") for way in (ReadOnGpu, _Read))
    assert furthest(ours, theirs) < apart


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_whole_cache_is_that_of_torch(documents, training):
    """fp32: in 16 bits two scores may be equal to rounding, and then the choice need not be the same."""
    module = cache_of(2, 64, 32, 8, 6).to("cuda")
    module.train(training)
    case = (1000, 2, 2, 64, 32, 8, 6, documents and training, training)
    assert furthest(of_cache(module, case, True), of_cache(module, case, False)) < 1e-4
