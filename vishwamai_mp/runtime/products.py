"""The fp32 matrix product of CPUs."""

import torch
from torch import Tensor


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of fp32 (or fp64) tensors, (…, I) and (O, I) → (…, O).

    torch gives fp32 matrices to MKL, which on AMD's CPUs reaches half of oneDNN's speed (EPYC with AVX-512: 200 and 440
    GFLOP/s with two threads).
    """
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if onednn and x.is_cpu and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.t()
