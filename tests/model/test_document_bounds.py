"""Packed documents as Transformer Engine takes them: lengths in place of a mask, rows laid end to end."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.model.builds import small_config
from tests.training.layouts import train
from vishwamai_mp.config import ConfigError
from vishwamai_mp.model.core_attention import CoreAttention
from vishwamai_mp.model.masks import check_packing, document_bounds, packed_documents


@given(st.lists(st.lists(st.integers(0, 1), min_size=9, max_size=9), min_size=1, max_size=4))
def test_bounds_are_those_of_a_loop(steps):
    ids = torch.tensor(steps).cumsum(1)
    flat = [(row, int(ids[row, place])) for row in range(len(steps)) for place in range(9)]
    bounds = [place for place in range(len(flat)) if place == 0 or flat[place] != flat[place - 1]] + [len(flat)]
    packed = packed_documents(document_bounds(ids))
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == bounds
    assert packed.cu_seqlens_q.dtype == torch.int32
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    assert packed.max_seqlen_q == packed.max_seqlen_kv == longest


def thd_attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attn_mask_type: Any = None,
    attention_bias: Tensor | None = None,
    packed_seq_params: Any = None,
) -> Tensor:
    """What Transformer Engine's attention computes from packed parameters, one document after the other.

    query (N, H, K), key and value (N, G, K) → (N, H·K), N tokens of all rows.
    """
    assert attention_mask is None
    assert attn_mask_type.name == "causal"
    bounds = packed_seq_params.cu_seqlens_q.tolist()
    assert bounds[-1] == query.shape[0]
    window = self.config.window_size
    out = []
    for start, end in itertools.pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        allowed = (distance >= 0) & (distance <= (window[0] if window else end))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale, enable_gqa=True))
    return torch.cat(out, 1).transpose(0, 1).flatten(1)


def train_packed(overrides: list[str], steps: int) -> list[tuple[float, float]]:
    """Runs in a worker: `layouts.train` as if attention were Transformer Engine's."""
    with (
        mock.patch("vishwamai_mp.model.model.use_transformer_engine", return_value=True),
        mock.patch.object(CoreAttention, "forward", thd_attention),
    ):
        return train(overrides, steps)


_DOCUMENTS = ["data.reset_attention_mask=true", "training.micro_batch_size=2"]
_TENSOR, _PIPELINE = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["data.reset_position_ids=true", "data.eod_mask_loss=true"],
        ["model.sliding_window=5"],
        ["data.prepared_rows=true", "tree={enabled: true, value_signal: verdicts, value_gradient: true}"],
    ],
)
@pytest.mark.parametrize(
    "layout",
    [[], [_TENSOR, "parallel.sequence_parallel=true"], [_PIPELINE, "training.recompute=full"]],
    ids=["one process", "TP2 SP", "PP2 recompute"],
)
def test_training_is_that_of_the_mask(workers, layout, settings):
    curves = workers.run(train_packed, 2 if layout else 1, [*_DOCUMENTS, *settings, *layout], 3)
    masked = workers.run(train, 1, [*_DOCUMENTS, *settings], 3)[0]
    for curve in curves:
        for ours, theirs in zip(curve, masked, strict=True):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
            assert ours[1] == pytest.approx(theirs[1], abs=1e-5)


def logits_both_ways(tokens: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    from tests.model.builds import build

    _, _, (model,) = build()
    with torch.no_grad():
        masked = model(tokens, document_ids=documents)
        model.attends_without_mask = True
        with mock.patch.object(CoreAttention, "forward", thd_attention):
            return masked, model(tokens, document_ids=documents)


def test_logits_come_in_the_usual_shape(workers):
    tokens = torch.arange(60).view(3, 20)
    documents = torch.stack([torch.arange(20) // size for size in (4, 7, 20)])
    masked, packed = workers.run(logits_both_ways, 1, tokens, documents)[0]
    # fp32 sums in another order: they err in proportion to the largest logit.
    torch.testing.assert_close(packed, masked, rtol=0, atol=1e-5 * float(masked.abs().max()))


def test_context_parallelism_is_refused():
    config = small_config("data.reset_attention_mask=true", "parallel.context_parallel_size=2")
    with pytest.raises(ConfigError, match=r"reset_attention_mask=true with parallel\.context_parallel_size=2.*use "):
        check_packing(config)
    check_packing(small_config("parallel.context_parallel_size=2"))
    check_packing(small_config("data.reset_attention_mask=true"))
