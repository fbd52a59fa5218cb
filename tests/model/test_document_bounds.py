"""Packed documents as Transformer Engine takes them: lengths in place of a mask, rows laid end to end.

Under context parallelism keys are gathered, and each part of a document has its own.
"""

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.builds import small_config
from tests.training.layouts import train
from vishwamai_mp.config import ConfigError
from vishwamai_mp.config.check_gpu_attention import check_gpu_attention
from vishwamai_mp.model import build_model
from vishwamai_mp.model.core_attention import CoreAttention
from vishwamai_mp.model.document_attention import DocumentAttention, PackedDocuments
from vishwamai_mp.model.masks import attention_mask, document_bounds, packed_documents
from vishwamai_mp.runtime.zigzag import local_positions

# isort: split
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType


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


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(2, 3),
    st.lists(st.lists(st.integers(0, 1), min_size=36, max_size=36), min_size=1, max_size=3),
)
def test_parts_and_their_keys_are_those_of_a_loop(chunk, ranks, steps):
    """Each token that a rank has is in one part; the part's keys end at it and begin with its document."""
    length = 2 * ranks * chunk
    ids = torch.tensor(steps).cumsum(1)[:, :length]
    order = [place for rank in range(ranks) for place in local_positions(length, rank, ranks).tolist()]
    for rank in range(ranks):
        own = local_positions(length, rank, ranks).tolist()
        bounds = document_bounds(ids, rank, ranks)
        packed = packed_documents(bounds)
        assert bounds.keys is not None
        keys = [(index % len(ids), order[index // len(ids)]) for index in bounds.keys.tolist()]  # row, place
        parts = list(itertools.pairwise(packed.cu_seqlens_q.tolist()))
        for (first, end), (first_key, end_key) in zip(
            parts, itertools.pairwise(packed.cu_seqlens_kv.tolist()), strict=True
        ):
            queries = [(index // len(own), own[index % len(own)]) for index in range(first, end)]
            row, last = queries[-1]
            document = [place for place in range(last + 1) if ids[row, place] == ids[row, last]]
            assert keys[first_key:end_key] == [(row, place) for place in document]
            assert queries == keys[end_key - len(queries) : end_key]
        assert parts[-1][1] == len(own) * len(ids)
        assert packed.cu_seqlens_kv[-1] == len(keys)
        assert packed.max_seqlen_q == packed.cu_seqlens_q.diff().max()
        assert packed.max_seqlen_kv == packed.cu_seqlens_kv.diff().max()
        assert packed.cu_seqlens_q.dtype == packed.cu_seqlens_kv.dtype == torch.int32


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

    query (N, H, K), key and value (S, G, K) → (N, H·K), N tokens of all rows.
    """
    assert attention_mask is None
    bounds, key_bounds = packed_seq_params.cu_seqlens_q.tolist(), packed_seq_params.cu_seqlens_kv.tolist()
    assert attn_mask_type.name == ("causal" if bounds == key_bounds else "padding_causal_bottom_right")
    assert [bounds[-1], key_bounds[-1]] == [query.shape[0], key.shape[0]]
    window = self.config.window_size
    out = []
    for own, keys in zip(itertools.pairwise(bounds), itertools.pairwise(key_bounds), strict=True):
        q, k, v = (x[slice(*at)].transpose(0, 1) for x, at in ((query, own), (key, keys), (value, keys)))
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        allowed = (distance >= 0) & (distance <= (window[0] if window else k.shape[1]))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale, enable_gqa=True))
    return torch.cat(out, 1).transpose(0, 1).flatten(1)


class ThdAttention(torch.nn.Module):
    """In the place of megatron-core's `TEDotProductAttention`, told of no context parallelism."""

    def __init__(self, *, config: Any, attention_type: str, cp_comm_type: Any, **options: Any) -> None:
        super().__init__()
        assert [config.context_parallel_size, attention_type, cp_comm_type] == [1, "cross", None]
        self.config, self.scale = config, options["softmax_scale"] or config.kv_channels**-0.5

    forward = thd_attention


_KERNEL = "megatron.core.extensions.transformer_engine.TEDotProductAttention"


@contextlib.contextmanager
def as_if_packed() -> Iterator[None]:
    """Models are built as if attention were Transformer Engine's."""
    with (
        mock.patch("vishwamai_mp.model.model.use_transformer_engine", return_value=True),
        mock.patch("vishwamai_mp.model.specs._core_attention", return_value=DocumentAttention),
        mock.patch(_KERNEL, ThdAttention),
    ):
        yield


def train_packed(overrides: list[str], steps: int) -> list[tuple[float, float]]:
    """Runs in a worker: `layouts.train` as if attention were Transformer Engine's."""
    with as_if_packed():
        return train(overrides, steps)


_DOCUMENTS = ["data.reset_attention_mask=true", "training.micro_batch_size=2"]
_COMPONENTS = [
    *("memory.enabled=true", "memory.memory_size=128", "memory.head_dim=16", "memory.layers=[1]", "memory.dropout=0"),
    *("cache.enabled=true", "cache.num_heads=8", "cache.segment_length=8", "cache.layers=[2]", "cache.dropout=0"),
]
_TENSOR, _PIPELINE, _CONTEXT = (
    f"parallel.{name}_parallel_size=2" for name in ("tensor_model", "pipeline_model", "context")
)


_SETTINGS = {
    "plain": [],
    "positions": ["data.reset_position_ids=true", "data.eod_mask_loss=true"],
    "window": ["model.sliding_window=5"],
    "components": [*_COMPONENTS, "data.reset_position_ids=true"],
    "values": ["data.prepared_rows=true", "tree={enabled: true, value_signal: verdicts, value_gradient: true}"],
}
_LAYOUTS = {
    "one process": [],
    "CP2": [_CONTEXT],
    "TP2 SP": [_TENSOR, "parallel.sequence_parallel=true"],
    "PP2 recompute": [_PIPELINE, "training.recompute=full"],
    "CP2 TP2 SP recompute": [_CONTEXT, _TENSOR, "parallel.sequence_parallel=true", "training.recompute=full"],
}


@pytest.fixture(scope="module")
def masked(workers) -> dict[str, list[tuple[float, float]]]:
    """The curves of one process with the mask."""
    return {name: workers.run(train, 1, [*_DOCUMENTS, *settings], 3)[0] for name, settings in _SETTINGS.items()}


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        *((layout, settings) for layout in ("one process", "CP2", "PP2 recompute") for settings in _SETTINGS),
        *((layout, settings) for layout in ("TP2 SP", "CP2 TP2 SP recompute") for settings in ("window", "components")),
    ],
)
def test_training_is_that_of_the_mask(workers, masked, layout, settings):
    options = _LAYOUTS[layout]
    ranks = 2 ** sum(option in options for option in (_TENSOR, _PIPELINE, _CONTEXT))
    for curve in workers.run(train_packed, ranks, [*_DOCUMENTS, *_SETTINGS[settings], *options], 3):
        for ours, theirs in zip(curve, masked[settings], strict=True):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
            assert ours[1] == pytest.approx(theirs[1], abs=1e-5)


def logits_both_ways(tokens: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    from tests.model.builds import build

    config, runtime, (model,) = build()
    with torch.no_grad(), as_if_packed():
        (packed,) = build_model(config, runtime)
        return model(tokens, document_ids=documents), packed.eval()(tokens, document_ids=documents)


def test_logits_come_in_the_usual_shape(workers):
    tokens = torch.arange(60).view(3, 20)
    documents = torch.stack([torch.arange(20) // size for size in (4, 7, 20)])
    masked, packed = workers.run(logits_both_ways, 1, tokens, documents)[0]
    # fp32 sums in another order: they err in proportion to the largest logit.
    torch.testing.assert_close(packed, masked, rtol=0, atol=1e-5 * float(masked.abs().max()))


def attention_both_ways(document_ids: Tensor, window: int | None) -> list[float]:
    """On one of the ranks that share rows: how far output and gradients are apart, by the largest number."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        context_parallel_size=ranks,
        attention_dropout=0.0,
        window_size=window and (window - 1, 0),
    )
    places = [local_positions(document_ids.shape[1], other, ranks) for other in range(ranks)]
    own, everywhere = places[rank], torch.cat(places)
    random = torch.Generator().manual_seed(rank)
    shape = (len(own), len(document_ids))
    inputs = [torch.randn((*shape, heads, 8), generator=random).requires_grad_() for heads in (8, 4, 4)]
    upstream = torch.randn((*shape, 64), generator=random)
    options = {
        "config": config,
        "layer_number": 1,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "softmax_scale": None,
        "pg_collection": SimpleNamespace(cp=dist.group.WORLD),
    }
    with mock.patch(_KERNEL, ThdAttention):
        parts = DocumentAttention(**options)
    masked = CoreAttention(**options)
    outs = [
        parts(*inputs, None, packed_seq_params=PackedDocuments(bounds=document_bounds(document_ids, rank, ranks))),
        masked(*inputs, attention_mask(own, everywhere, window, document_ids)),
    ]
    found = [[out.detach(), *torch.autograd.grad(out, inputs, upstream)] for out in outs]
    return [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in zip(*found, strict=True)]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_documents_attend_as_with_the_mask(workers, ranks, window):
    """Three rows of 48 tokens: many short documents, some that all ranks have a part of, and one alone."""
    ids = torch.stack([torch.arange(48) // size for size in (5, 22, 48)])
    for differences in workers.run(attention_both_ways, ranks, ids, window):
        assert len(differences) == 4
        assert max(differences) < 1e-6


def test_what_context_parallelism_refuses():
    packed, context = "data.reset_attention_mask=true", "parallel.context_parallel_size=2"
    dropout, bf16 = "model.attention_dropout=0.1", "precision=bf16"
    with pytest.raises(ConfigError, match=r"model\.attention_dropout=0\.1 with data.*context_parallel_size=2.*; set "):
        check_gpu_attention(small_config(packed, context, dropout, bf16))
    check_gpu_attention(small_config(packed, context, bf16))
    check_gpu_attention(small_config(context, dropout, bf16))
    check_gpu_attention(small_config(packed, dropout))
