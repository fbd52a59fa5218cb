"""Programs that look at the memory's Triton kernels without a GPU; each runs in a process of its own.

usage: kernel_programs.py interpret            the kernels' results beside the CPU's, by Triton's interpreter
       kernel_programs.py compile SM [KERNEL]  registers, spills and shared memory of the kernels on sm_SM
       kernel_programs.py roofline             bytes, FLOPs and the least time of each launch on an H100

Each prints JSON. The first two need Triton.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if "interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from unittest import mock

import torch
from torch import Tensor

from tests.kernel_visits import compiling, counting
from tests.neural_memory.test_delta_rule import everything, furthest, tokens
from vishwamai_mp.config import MemoryConfig
from vishwamai_mp.neural_memory import ReasoningMemoryTransformer, memory_module
from vishwamai_mp.neural_memory.delta_rule import empty_state, momentum_delta_rule
from vishwamai_mp.neural_memory.delta_rule_on_gpu import DeltaRuleOnGpu, Launches
from vishwamai_mp.neural_memory.levels import LevelState
from vishwamai_mp.neural_memory.memory_module import MemoryState
from vishwamai_mp.neural_memory.memory_on_gpu import Parameters, Surroundings
from vishwamai_mp.runtime import triton_kernels

# Tokens, chunk, rows, heads, widths of keys and values, reads, momentum, documents, carried state.
_CASES: list[tuple[int, int, int, int, int, int, int, bool, bool, bool]] = [
    (20, 16, 1, 1, 16, 16, 1, True, False, False),
    (9, 16, 2, 2, 8, 6, 2, True, True, True),
    (40, 32, 1, 1, 40, 33, 1, False, True, True),
    (70, 64, 1, 1, 128, 128, 2, True, True, True),
    (3, 64, 1, 2, 4, 4, 2, False, False, False),
]


def _by_kernels(
    reads: list[Tensor],
    keys: Tensor,
    values: Tensor,
    log_forget: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    starts: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
) -> Any:
    if state is None:
        state = empty_state(keys, values, log_momentum is not None)
    final, surprise, *outputs = DeltaRuleOnGpu.apply(
        chunk_size, starts, state, keys, values, log_forget, log_momentum, rate, *reads
    )
    return outputs, final, surprise


def interpret() -> None:
    """Of each case the largest difference of any result or gradient, in terms of its largest entry."""
    found = {}
    for case in _CASES:
        length, chunk, batch, heads, width, value_width, reads, momentum, documents, carried = case
        inputs = tokens(
            length,
            batch=batch,
            heads=heads,
            width=width,
            values=value_width,
            reads=reads,
            momentum=momentum,
            dtype=torch.float32,
        )
        generator = torch.Generator().manual_seed(2)
        starts = torch.rand(length, batch, generator=generator) < 0.1 if documents else None
        shape = (batch, heads, 2 if momentum else 1, width, value_width)
        state = torch.randn(shape, generator=generator) if carried else None
        ours = everything(_by_kernels, inputs, starts, state, chunk_size=chunk)
        theirs = everything(momentum_delta_rule, inputs, starts, state, chunk_size=chunk)
        found[" ".join(map(str, case))] = furthest(ours, theirs)
    print(json.dumps(found))


# Tokens, rows, heads, width, levels, momentum, documents, carried state.
_MEMORIES: list[tuple[int, int, int, int, int, bool, bool, bool]] = [
    (37, 1, 2, 16, 2, True, True, True),
    (18, 2, 1, 20, 3, True, True, False),
    (5, 1, 1, 16, 1, False, False, True),
]


def interpret_memories() -> None:
    """The same for what surrounds the rule: `remember` beside the module's operators."""
    found = {}
    for case in _MEMORIES:
        _, _, heads, width, levels, momentum, _, _ = case
        module = memory_of(heads, width, levels, momentum)
        theirs = of_memory(module, case)
        with mock.patch.object(memory_module, "supports", return_value=True):
            found[" ".join(map(str, case))] = furthest(of_memory(module, case), theirs)
    print(json.dumps(found))


def memory_of(heads: int, width: int, levels: int, momentum: bool) -> ReasoningMemoryTransformer:
    """Alone, with random values in every parameter."""
    size = heads * width
    config = MemoryConfig(hidden_size=size, memory_size=size, head_dim=width, num_memory_layers=levels)
    module = ReasoningMemoryTransformer(replace(config, momentum=momentum))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def of_memory(module: ReasoningMemoryTransformer, case: tuple) -> list[Tensor]:
    """Results and gradients of all that comes between the projections, on the module's device and in its dtype."""
    length, rows, heads, width, levels, momentum, documents, carried = case
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(module.taps)

    projected = draw(length, rows, heads, 3 * levels * width + width + levels * module.gates).requires_grad_()
    ids = None
    if documents:  # a document goes on from the row before; some last one token
        ids = (torch.rand(rows, length, generator=generator) < 0.15).cumsum(1).to(projected.device)
    state = None
    if carried:
        parts = 2 if momentum else 1
        kept = [
            LevelState(
                draw(rows, heads, parts, width, width).float().requires_grad_(),
                draw(rows, heads).float().requires_grad_() if momentum else None,
            )
            for _ in range(levels)
        ]
        state = MemoryState(draw(3, rows, heads, 3 * levels * width), tuple(kept))
    module.zero_grad()
    read, after, sums = module._remember(projected, ids, state)
    results = [read, after.recent, *(x for level in after.levels for x in (level.memory, level.ratio))]
    differentiable = [x for x in results if x is not None and x.requires_grad]
    torch.autograd.backward(differentiable, [draw(*x.shape) for x in differentiable])
    given = [] if state is None else [x for level in state.levels for x in (level.memory, level.ratio)]
    own = [module.taps, module.gate_bias, module.read_norm, module.level_mix]
    grads = [x.grad for x in (projected, *given, *own) if x is not None]
    return [x.detach() for x in (*results, *sums, *grads) if x is not None]


def compile_for(target: int, wanted: str | None) -> None:
    """Of the launches in `_walk`: registers, bytes on the stack, shared memory."""
    found: dict[str, dict[str, int]] = {}
    _walk(compiling(found, target, wanted), 2048, 4)
    print(json.dumps(found))


def roofline() -> None:
    """One level of 16 heads, 128 wide, over 32,768 tokens in bf16, and a memory of three; each tensor moved once."""
    found: dict[str, dict[str, float]] = {}
    _walk(counting(found), 32768, 16)
    print(json.dumps(found))


def _walk(visit: Callable[..., None], length: int, heads: int) -> None:
    """All launches of the largest case: bf16, heads 128 wide, momentum and documents; two reads, three levels."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    levels, width, gates = 3, 128, 3
    features = 3 * levels * width
    documents, recent = tensor(1, length, dtype=torch.int64), tensor(3, 1, heads, features)
    own = Parameters(tensor(heads, 4 * features), tensor(heads, levels * gates), tensor(heads, width), tensor(heads, 3))
    states = [tensor(1, heads, 2, width, width, dtype=torch.float32)] * levels
    projected = tensor(length, 1, heads, features + width + levels * gates)
    call = Surroundings(64, 1e-6, documents, recent, projected, own, states)
    with mock.patch.object(triton_kernels, "run_kernel", visit):
        result, kept = call.forward(None)
        call.backward(kept, result.read, None, [None] * levels)
        # Alone and last, for figures by name: a level that is read twice.
        slices, opened, starts = kept[:3]
        assert slices is not None and opened is not None  # noqa: PT018
        rule = Launches(64, starts, states[0], *_first_level(slices, opened))
        _, final, _, updates = rule.forward()
        rule.backward(updates, [result.read, result.read], final)


def _first_level(slices: Tensor, gates: Tensor) -> list[Tensor]:
    reads, keys, values, _, later = slices.unbind(3)[:5]
    return [keys, values, gates[1, 0], gates[2, 0], gates[0, 0], reads, later]


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret() if len(sys.argv) < 3 else interpret_memories()
    elif sys.argv[1] == "roofline":
        roofline()
    else:
        compile_for(int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
