"""Core attention: both kernels against a softmax written out in float64."""

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from vishwamai_mp.model import blocked_attention, core_attention
from vishwamai_mp.model.masks import attention_mask

_HEADS, _WIDTH = 4, 8


def attention(groups: int = _HEADS, dropout: float = 0.0, **arguments: Any) -> core_attention.CoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=_HEADS * _WIDTH,
        num_attention_heads=_HEADS,
        num_query_groups=groups,
        attention_dropout=dropout,
    )
    alone = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    return core_attention.CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=alone, **arguments)


def inputs(queries: int, keys: int, groups: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, 2, _HEADS, _WIDTH), (keys, 2, groups, _WIDTH), (keys, 2, groups, _WIDTH)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def naive(tensors: list[Tensor], mask: Tensor | None, scale: float, cap: float | None = None) -> Tensor:
    """softmax(QKᵀ·scale + mask)V, with capped scores if so, token by token and head by head, in float64."""
    query, key, value = tensors
    queries, rows, heads, _ = query.shape
    keys, groups = key.shape[0], key.shape[2]
    out = []
    for t in range(queries):
        for b in range(rows):
            for h in range(heads):
                k, v = (x.double()[:, b, h * groups // heads] for x in (key, value))
                seen = [s for s in range(keys) if (s <= keys - queries + t if mask is None else bool(mask[b, 0, t, s]))]
                scores = k[seen] @ query.double()[t, b, h] * scale
                scores = cap * (scores / cap).tanh() if cap else scores
                out.append(scores.softmax(0) @ v[seen])
    return torch.stack(out).view(queries, rows, -1)


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    places, all_keys = torch.arange(keys - queries, keys), torch.arange(keys)
    documents = torch.tensor([[0] * 3 + [1] * (keys - 3), [0] * (keys - 2) + [1] * 2])
    return {
        "causal": None,
        "window": attention_mask(places, all_keys, window=4).expand(2, -1, -1, -1),
        "documents": attention_mask(places, all_keys, document_ids=documents),
    }


@pytest.fixture(params=["fused", "blocked"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel is taken. Blocks are small, so that there are several."""
    monkeypatch.setattr(core_attention, "_LONGEST", 0 if request.param == "fused" else 2048)
    monkeypatch.setattr(blocked_attention, "_BLOCK", 4)
    return request.param


@pytest.mark.parametrize(("queries", "keys"), [(11, 11), (3, 11), (1, 11)])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_both_kernels_are_softmax_attention(kernel, name, groups, queries, keys):
    mask = masks(queries, keys)[name]
    tensors = inputs(queries, keys, groups, torch.float32)
    ours = attention(groups)(*tensors, mask)
    theirs = naive(tensors, mask, 1 / math.sqrt(_WIDTH))
    assert ours.shape == (queries, 2, _HEADS * _WIDTH)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6)
    weights = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), tensors),
        torch.autograd.grad((theirs * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("queries", "keys"), [(11, 11), (3, 11), (1, 11)])
@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_scores_with_a_soft_cap(kernel, name, queries, keys):
    mask, tensors = masks(queries, keys)[name], inputs(queries, keys, 2, torch.float32)
    ours, theirs = attention(2, softcap=0.7)(*tensors, mask), naive(tensors, mask, 1 / math.sqrt(_WIDTH), 0.7)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6)
    weights = torch.randn_like(ours)
    grads = [torch.autograd.grad((out * weights).sum(), tensors) for out in (ours, theirs)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    assert (ours - attention(2)(*tensors, mask)).abs().max() > (1e-3 if queries > 1 else 1e-4)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_16_bit_inputs(monkeypatch, kernel, name, dtype, native):
    """Widened, the kernels round once; with 16-bit hardware they round their weights too."""
    if native and not core_attention.multiplies_natively(dtype):
        pytest.skip(f"this CPU has no {dtype} matrix product")
    monkeypatch.setattr(core_attention, "multiplies_natively", lambda dtype: native)
    mask = masks(11, 11)[name]
    tensors = inputs(11, 11, 2, dtype)
    ours = attention(2)(*tensors, mask)
    theirs = naive(tensors, mask, 1 / math.sqrt(_WIDTH))
    assert ours.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    limit = torch.full_like(theirs, 4 * epsilon) if native else epsilon / 2 * theirs.abs() + 1e-6
    assert ((ours.double() - theirs).abs() <= limit).all()


def test_length_and_dropout_decide_the_kernel(monkeypatch):
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True, tp_rank=0, ep_rank=0, etp_rank=0)
    blocked = mock.Mock(side_effect=blocked_attention.blocked_attention)
    for choice in core_attention._ATTENTION.values():
        monkeypatch.setitem(choice.ways, "blocked", blocked)
    monkeypatch.setattr(core_attention, "_LONGEST", 8)
    for length, dropout, calls in [(8, 0.0, 1), (9, 0.0, 1), (1, 0.0, 1), (8, 0.1, 1)]:
        attention(dropout=dropout)(*inputs(length, length, 4, torch.float32), None)
        assert blocked.call_count == calls


def test_dropout_keeps_the_mean_and_ends_with_evaluation(kernel):
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True, tp_rank=0, ep_rank=0, etp_rank=0)
    core = attention(dropout=0.25)
    query, key, value = inputs(200, 200, 4, torch.float32)
    ones = torch.ones_like(value)
    once, again = core(query, key, ones, None), core(query, key, ones, None)
    assert not torch.equal(once, again)
    # Late tokens average over many keys: with values of one, what is kept and scaled up has mean one.
    assert abs(float(once.detach()[100:].mean()) - 1) < 0.01
    assert float(once.detach().std()) > 0.01
    torch.testing.assert_close(core.eval()(query, key, ones, None), torch.ones_like(once))


def test_scale_can_be_given():
    tensors = inputs(5, 5, 4, torch.float32)
    ours = attention(softmax_scale=0.3)(*tensors, None)
    torch.testing.assert_close(ours.double(), naive(tensors, None, 0.3), rtol=0, atol=2e-6)
