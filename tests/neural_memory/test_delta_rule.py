"""The chunked rule and its backward pass against the recurrence, and at the edge of what numbers can hold."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.neural_memory.oracle import recur
from vishwamai_mp.neural_memory.delta_rule import momentum_delta_rule, one_token


def tokens(
    length: int,
    *,
    batch: int = 2,
    heads: int = 2,
    width: int = 8,
    values: int = 6,
    reads: int = 1,
    momentum: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(length, batch, heads, *shape, generator=generator, dtype=torch.float64).to(dtype)

    forget, held, write = draw().sigmoid(), draw().sigmoid(), draw().sigmoid()
    return {
        "reads": [draw(width) for _ in range(reads)],
        "keys": draw(width),
        "values": draw(values),
        "log_forget": 0.1 * forget.log(),
        "log_momentum": held.log() if momentum else None,
        "rate": write * (1 - held) if momentum else write,
    }


def everything(rule: Any, inputs: dict[str, Any], starts: Tensor | None, state: Tensor | None, **options: Any) -> Any:
    """All results and all gradients of a random function of them."""
    leaves = [x for x in (*inputs["reads"], *list(inputs.values())[1:], state) if x is not None]
    leaves = [x.requires_grad_() for x in leaves]
    outputs, final, surprise = rule(**inputs, starts=starts, state=state, **options)
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (*outputs, final)]
    loss = sum((x * weight).sum() for x, weight in zip((*outputs, final), draw, strict=True))
    return [*outputs, final, surprise, *torch.autograd.grad(loss, leaves)]


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, in terms of each tensor's largest entry."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max().detach() / b.abs().max().detach().clamp(min=1e-30)) for a, b in pairs)


@pytest.mark.parametrize("chunk_size", [1, 16, 64, 128])
@pytest.mark.parametrize(
    ("momentum", "reads", "documents", "carried"),
    [(True, 1, False, False), (True, 2, True, True), (False, 1, True, False), (False, 2, False, True)],
)
def test_chunks_equal_the_recurrence_in_fp64(chunk_size, momentum, reads, documents, carried):
    """Also where the length is no multiple of the chunk, and past a group of chunks."""
    length = 150 if chunk_size < 128 else 530
    inputs = tokens(length, reads=reads, momentum=momentum)
    generator = torch.Generator().manual_seed(2)
    starts = torch.rand(length, 2, generator=generator) < 0.05 if documents else None
    shape = (2, 2, 2 if momentum else 1, 8, 6)
    state = torch.randn(shape, generator=generator, dtype=torch.float64) if carried else None
    ours = everything(momentum_delta_rule, inputs, starts, state, chunk_size=chunk_size)
    theirs = everything(recur, inputs, starts, state)
    assert furthest(ours, theirs) < 1e-12


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 48),
    st.lists(st.integers(0, 39), max_size=6),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_length_chunk_and_documents(length, chunk_size, begins, reads, momentum, seed):
    inputs = tokens(length, reads=reads, momentum=momentum, seed=seed, width=3, values=2)
    starts = torch.zeros(length, 2, dtype=torch.bool)
    starts[[t for t in begins if t < length], torch.tensor(0)] = True
    ours = everything(momentum_delta_rule, inputs, starts, None, chunk_size=chunk_size)
    assert furthest(ours, everything(recur, inputs, starts, None)) < 1e-11


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
def test_chunk_sizes_agree_in_fp32(chunk_size):
    """With the memory's own width, 128, and keys that repeat."""
    inputs = tokens(256, width=128, values=128, dtype=torch.float32)
    inputs["keys"] = inputs["keys"][torch.arange(256) % 40]
    exact = {name: _double(x) for name, x in inputs.items()}
    with torch.no_grad():
        (ours,), final, _ = momentum_delta_rule(**inputs, chunk_size=chunk_size)
        (theirs,), truth, _ = recur(**exact)
    assert float((ours - theirs).abs().max()) < 1e-5
    assert float((final - truth).abs().max()) < 1e-5


def _double(x: Any) -> Any:
    return [_double(item) for item in x] if isinstance(x, list) else x.double()


def test_state_continues_where_it_stopped():
    inputs = tokens(100)
    whole, final, _ = momentum_delta_rule(**inputs, chunk_size=16)
    parts: list[Tensor] = []
    state: Any = None
    for span in (slice(0, 37), slice(37, 64), slice(64, 100)):
        cut: dict[str, Any] = {
            name: [x[span] for x in item] if name == "reads" else item[span] for name, item in inputs.items()
        }
        (out,), state, _ = momentum_delta_rule(**cut, state=state, chunk_size=16)
        parts.append(out)
    assert furthest([torch.cat(parts), state], [whole[0], final]) < 1e-12


@pytest.mark.parametrize("momentum", [True, False])
def test_recurrence_equals_the_rule(momentum):
    inputs = tokens(20, reads=2, momentum=momentum)
    (first, second), final, _ = recur(**inputs)
    state = torch.zeros(2, 2, 2 if momentum else 1, 8, 6, dtype=torch.float64)
    outputs = []
    for t in range(20):
        kept = state.clone()
        log_momentum = inputs["log_momentum"][t] if momentum else None
        found, state = one_token(
            [read[t] for read in inputs["reads"]],
            inputs["keys"][t],
            inputs["values"][t],
            inputs["log_forget"][t],
            log_momentum,
            inputs["rate"][t],
            before := state,
        )
        assert torch.equal(before, kept), "states are values"
        outputs.append(torch.stack(found))
    assert furthest([torch.stack(outputs, 1), state], [torch.stack((first, second)), final]) < 1e-12


def test_later_tokens_leave_earlier_reads_bitwise_alone():
    inputs = tokens(100, dtype=torch.float32)
    (before,), _, _ = momentum_delta_rule(**inputs, chunk_size=16)
    for name in ("keys", "values", "log_forget", "log_momentum", "rate"):
        changed = dict(inputs)
        changed[name] = inputs[name].clone()
        changed[name][50] = inputs[name][50] * 0.5 - 0.25
        (after,), _, _ = momentum_delta_rule(**changed, chunk_size=16)
        assert torch.equal(before[:50], after[:50]), name
        assert not torch.equal(before[50:], after[50:]), name


def test_memory_for_backward_is_the_inputs_and_little_more():
    """What is kept grows by far less than one state per chunk, let alone per token."""
    inputs = tokens(2048, heads=1, batch=1, width=64, values=64, dtype=torch.float32)
    for name in ("keys", "values", "rate"):
        inputs[name].requires_grad_()
    outputs, _, _ = momentum_delta_rule(**inputs)
    kept: Any = outputs[0].grad_fn
    states = sum(x.numel() for x in itertools.chain(kept.carried, kept.updates))
    per_group, per_token = 2 * 64 * 64, 64
    assert states == 2048 // 512 * per_group + 2048 * per_token
