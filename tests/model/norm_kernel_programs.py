"""Programs that look at the norm's Triton kernels without a GPU; each runs in a process of its own.

usage: norm_kernel_programs.py interpret            the kernels' results beside the CPU's, by Triton's interpreter
       norm_kernel_programs.py compile SM [KERNEL]  registers, spills and shared memory of the kernels on sm_SM
       norm_kernel_programs.py roofline             bytes and the least time of each launch on an H100

Each prints JSON. The first two need Triton.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if "interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from torch import Tensor

from tests.kernel_visits import compiling, counting
from vishwamai_mp.model import norm
from vishwamai_mp.model.norm import NormOnGpu, _RMSNorm
from vishwamai_mp.runtime import triton_kernels

# Tokens, rows, width, what is added to the weight; programs of the backward pass at most.
_CASES: list[tuple[int, int, int, float, int]] = [(5, 2, 40, 1.0, 3), (3, 1, 17, 0.0, 512)]


def of_norm(way: Any, tokens: int, rows: int, width: int, offset: float, device: str = "cpu") -> list[Tensor]:
    """The result and both gradients, of an input that is not contiguous; then those with the input beside its norm."""
    generator = torch.Generator().manual_seed(7)
    x, grad, weight, other = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((rows, tokens, width), (tokens, rows, width), (width,), (tokens, rows, width))
    )
    leaves = [x.transpose(0, 1).requires_grad_(), weight.requires_grad_()]
    found = way.apply(*leaves, 1e-3, offset)
    both = out, _ = found if isinstance(found, tuple) else (found, leaves[0])
    alone = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return [out.detach(), *alone, *torch.autograd.grad(both, leaves, (grad, other))]


def interpret() -> None:
    """Of each case the largest difference of any result or gradient, in terms of its largest entry."""
    found = {}
    for tokens, rows, width, offset, programs in _CASES:
        case = tokens, rows, width, offset
        with mock.patch.object(norm, "_PROGRAMS", programs):
            pairs = zip(of_norm(NormOnGpu, *case), of_norm(_RMSNorm, *case), strict=True)
            found[" ".join(map(str, case))] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    print(json.dumps(found))


def _walk(visit: Callable[..., None], tokens: int, width: int) -> None:
    x = torch.empty(tokens, 1, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with mock.patch.object(triton_kernels, "run_kernel", visit), mock.patch.object(norm, "run_kernel", visit):
        out, beside = NormOnGpu.apply(x, weight, 1e-5, 0.0)
        torch.autograd.grad((out, beside), (x, weight), (torch.empty_like(x), torch.empty_like(x)))


if __name__ == "__main__":
    seen: dict[str, Any] = {}
    if sys.argv[1] == "interpret":
        interpret()
    elif sys.argv[1] == "roofline":  # 32,768 tokens, 8,192 wide, in bf16
        _walk(counting(seen), 32768, 8192)
        print(json.dumps(seen))
    else:  # as wide as the kernels take
        _walk(compiling(seen, int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None), 64, 8192)
        print(json.dumps(seen))
