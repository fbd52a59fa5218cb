"""Programs that look at the cache's Triton kernels without a GPU; each runs in a process of its own.

usage: cache_kernel_programs.py interpret            the kernels' results beside the CPU's, by Triton's interpreter
       cache_kernel_programs.py compile SM [KERNEL]  registers, spills and shared memory of the kernels on sm_SM
       cache_kernel_programs.py roofline             bytes, FLOPs and the least time of each launch on an H100

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
from vishwamai_mp.cache_augmentation.read import Chosen, Everything, Latents, _Read, with_null
from vishwamai_mp.cache_augmentation.reading_on_gpu import ReadOnGpu, Reads
from vishwamai_mp.runtime import triton_kernels

# Rows × heads, blocks, queries, segments, latents, width; segments chosen (0: all are looked at).
_CASES = [(2, 3, 20, 7, 8, 24, 3), (2, 2, 33, 5, 3, 16, 0), (2, 2, 5, 6, 1, 8, 2)]


def plan_of(groups: int, blocks: int, queries: int, segments: int, chosen: int, device: str) -> Chosen | Everything:
    """Who reads what, at random; segment 0 is the null segment."""
    generator = torch.Generator().manual_seed(5)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    null = torch.zeros(groups, blocks, 1, dtype=torch.long)
    if not chosen:
        since = integers(-2, queries, groups, blocks, segments)
        until = since + integers(0, queries, groups, blocks, segments)
        since, until = torch.cat((null, since), -1), torch.cat((null + queries, until), -1)
        return Everything(since.to(device), until.to(device), (segments + 1,) * blocks)
    order = torch.rand(groups, blocks, segments, generator=generator).argsort(-1)[..., :chosen] + 1
    known = torch.rand(order.shape, generator=generator) < 0.7
    own = integers(1, segments + 1, groups, blocks, queries)
    own_known = (own[..., None] != order[:, :, None]).all(-1)
    listed, known = torch.cat((null, order), -1), torch.cat((null == 0, known), -1)
    return Chosen(*(x.to(device) for x in (listed, known, own, own_known)))


def of_reading(way: Any, case: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Results and gradients; one latent holds nothing."""
    groups, blocks, queries, segments, latents, width, chosen = case
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    held = Latents(
        draw(groups, segments, latents, width),
        draw(groups, segments, latents, width),
        draw(groups, segments, latents).float() - 1,
    )
    held.bias[0, -1, -1] = -torch.inf
    leaves = [x.requires_grad_() for x in (draw(groups, blocks, queries, width), *with_null(held, draw(groups, width)))]
    real = (torch.rand(groups, blocks, queries, generator=generator) < 0.8).to(device)
    plan = plan_of(groups, blocks, queries, segments, chosen, device)
    out, null, entropy, mass = way.apply(*leaves, plan, real)
    grads = torch.autograd.grad(out, leaves, draw(*out.shape))
    return [x.detach() for x in (out, null, entropy, mass, *grads)]


def interpret() -> None:
    """Of each case the largest difference of any result or gradient, in terms of its largest entry."""
    found = {}
    for case in _CASES:
        ours, theirs = (of_reading(way, case, torch.float32) for way in (ReadOnGpu, _Read))
        pairs = zip(ours, theirs, strict=True)
        found[" ".join(map(str, case))] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    print(json.dumps(found))


def _walk(visit: Callable[..., None], groups: int, blocks: int, segments: int, width: int) -> None:
    """Blocks of 64 queries that look at the null segment and 64 others of 8 latents, in bf16."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    listed, known = tensor(groups, blocks, 65, dtype=torch.int64), tensor(groups, blocks, 65, dtype=torch.bool)
    own, own_known = tensor(groups, blocks, 64, dtype=torch.int64), tensor(groups, blocks, 64, dtype=torch.bool)
    keys, bias = tensor(groups, segments, 8, width), tensor(groups, segments, 8, dtype=torch.float32)
    plan, values = Chosen(listed, known, own, own_known), torch.empty_like(keys)
    call = Reads(plan, tensor(groups, blocks, 64, width), keys, values, bias)
    with mock.patch.object(triton_kernels, "run_kernel", visit):
        out, _, _, _, lse = call.forward(own_known)
        call.backward(out, lse, out)


def compile_for(target: int, wanted: str | None) -> None:
    """Of the launches in `_walk`, with heads as wide as the kernels take."""
    found: dict[str, dict[str, int]] = {}
    _walk(compiling(found, target, wanted), 8, 32, 33, 512)
    print(json.dumps(found))


def roofline() -> None:
    """8 heads, 512 wide, over 32,768 tokens in bf16."""
    found: dict[str, dict[str, float]] = {}
    _walk(counting(found, 989), 8, 512, 513, 512)
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret()
    elif sys.argv[1] == "roofline":
        roofline()
    else:
        compile_for(int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
