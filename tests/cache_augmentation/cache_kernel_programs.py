"""Programs that look at the cache's Triton kernels without a GPU; each runs in a process of its own.

usage: cache_kernel_programs.py interpret [whole]    the kernels' results beside the CPU's, by Triton's interpreter
       cache_kernel_programs.py compile SM [KERNEL]  registers, spills and shared memory of the kernels on sm_SM
       cache_kernel_programs.py roofline             bytes, FLOPs and the least time of each launch on an H100

Each prints JSON. The first two need Triton.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if "interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from torch import Tensor

from tests.kernel_visits import compiling, counting
from tests.neural_memory.test_delta_rule import furthest
from vishwamai_mp.cache_augmentation import CacheConfig, DifferentiableCacheAugmentation
from vishwamai_mp.cache_augmentation.cache_on_gpu import Parameters, augment
from vishwamai_mp.cache_augmentation.read import Chosen, Everything, Latents, _Read, with_null
from vishwamai_mp.cache_augmentation.reading_on_gpu import ReadOnGpu
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


# Tokens, rows, heads, width, segment, latents, segments retrieved, documents, training.
_CACHES: list[tuple[int, int, int, int, int, int, int, bool, bool]] = [
    (70, 2, 2, 20, 6, 3, 4, True, True),
    (45, 1, 2, 16, 8, 2, 2, False, True),
    (34, 2, 1, 8, 8, 1, 9, True, True),
    (33, 1, 2, 8, 4, 2, 9, False, False),
    (33, 2, 1, 8, 4, 2, 3, False, False),
]


def interpret_caches() -> None:
    """The same for all between the projections: `augment` beside the module's operators."""
    found = {}
    for case in _CACHES:
        _, _, heads, width, segment, latents, retrieve, _, training = case
        module = cache_of(heads, width, segment, latents, retrieve)
        module.train(training)
        found[" ".join(map(str, case))] = furthest(of_cache(module, case, True), of_cache(module, case, False))
    print(json.dumps(found))


def cache_of(heads: int, width: int, segment: int, latents: int, retrieve: int) -> DifferentiableCacheAugmentation:
    """Alone, with random values in every parameter."""
    config = CacheConfig(hidden_size=heads * width, num_heads=heads, segment_length=segment, retrieve_segments=retrieve)
    module = DifferentiableCacheAugmentation(
        replace(config, latents_per_segment=latents, max_cache_length=64 * latents)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def of_cache(module: DifferentiableCacheAugmentation, case: tuple, by_kernels: bool) -> list[Tensor]:
    """Results, measures and gradients of all that comes between the projections, on the module's device."""
    tokens, rows, heads, _, segment, _, retrieve, documents, training = case
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(module.null_key)

    projected = draw(tokens, rows, heads, module.widths.total).requires_grad_()
    ids = None
    if documents:  # some last one token, some are shorter than a segment
        ids = (torch.rand(rows, tokens, generator=generator) < 0.08).cumsum(1).to(projected.device)
    alone = not training
    module.zero_grad()
    if by_kernels:
        read, state = module._augment(projected, ids, alone)
    else:
        read, state = module._read_rows(*module.widths.split(projected), ids, alone)
    if state is not None:
        keys, values, bias = state.latents
        return [read.detach(), keys, values, bias.exp(), state.access, state.content, state.scores]
    measures = module.measures.take()
    read.backward(draw(*read.shape))
    own = [module.position_bias, module.importance_weight, module.importance_bias, module.null_key]
    # Where documents' tokens read all segments, other tokens have their entropy measured.
    means = [
        torch.as_tensor(total / weight).float()
        for name, (total, weight) in sorted(measures.items())
        if name != "cache_entropy" or not documents or tokens // segment > retrieve
    ]
    return [read.detach(), *means, *(x.grad for x in (projected, *own) if x.grad is not None)]


def _walk(visit: Callable[..., None], heads: int, tokens: int, width: int) -> None:
    """A row of documents in bf16, segments of 64 tokens and 8 latents, of which 64 are chosen."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype == torch.bfloat16)

    own = Parameters(tensor(heads, 8, 64), tensor(heads, 8), tensor(heads), tensor(heads, width))
    documents = tensor(1, tokens, dtype=torch.int64)
    with mock.patch.object(triton_kernels, "run_kernel", visit):
        found = augment(tensor(tokens, 1, heads, 3 * width + 16), own, documents, 64, 8192, False)
        found.read.backward(torch.empty_like(found.read))


def compile_for(target: int, wanted: str | None) -> None:
    """Of the launches in `_walk`, with heads as wide as the kernels take."""
    found: dict[str, dict[str, int]] = {}
    _walk(compiling(found, target, wanted), 8, 32768, 512)
    print(json.dumps(found))


def roofline() -> None:
    """8 heads, 512 wide, over 32,768 tokens in bf16."""
    found: dict[str, dict[str, float]] = {}
    _walk(counting(found, 989), 8, 32768, 512)
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret() if len(sys.argv) < 3 else interpret_caches()
    elif sys.argv[1] == "roofline":
        roofline()
    else:
        compile_for(int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
