"""Masks against a loop over all pairs of tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vishwamai_mp.data.batches import context_shard
from vishwamai_mp.model.masks import attention_mask
from vishwamai_mp.runtime.zigzag import local_positions


def naive(query: int, key: int, window: int | None, documents: list[int] | None) -> bool:
    """May the token at `query` see the one at `key`?"""
    if key > query:
        return False
    if window is not None and query - key >= window:
        return False
    return documents is None or documents[query] == documents[key]


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, int, int | None, list[list[int]] | None]:
    """Context parallel size, length, window, document ids of a few rows."""
    size = draw(st.integers(1, 4))
    length = 2 * size * draw(st.integers(1, 5))
    window = draw(st.none() | st.integers(1, length + 2))
    steps = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    documents = draw(st.none() | st.lists(steps, min_size=1, max_size=3))
    if documents is not None:
        documents = [torch.tensor(row).cumsum(0).tolist() for row in documents]
    return size, length, window, documents


@given(rows())
def test_mask_is_the_naive_one_on_every_context_rank(row):
    size, length, window, documents = row
    keys = [local_positions(length, rank, size) for rank in range(size)]
    assert sorted(torch.cat(keys).tolist()) == list(range(length))
    ids = None if documents is None else torch.tensor(documents)
    for queries in keys:
        mask = attention_mask(queries, torch.cat(keys), window, ids)
        expected = [
            [[naive(q, k, window, line) for k in torch.cat(keys).tolist()] for q in queries.tolist()]
            for line in (documents or [None])
        ]
        assert torch.equal(mask, torch.tensor(expected)[:, None])


@given(st.integers(1, 4), st.integers(1, 6))
def test_ranks_hold_the_tokens_that_the_data_gives_them(size, chunk):
    """The model and the loss mask cut a sequence alike."""
    length = 2 * size * chunk
    for rank in range(size):
        expected = context_shard(torch.arange(length)[None], rank, size)[0]
        assert torch.equal(local_positions(length, rank, size), expected)


@given(st.integers(2, 6), st.integers(1, 8))
def test_context_ranks_share_the_causal_triangle_evenly(size, chunk):
    length = 2 * size * chunk
    keys = torch.arange(length)
    work = {int(attention_mask(local_positions(length, rank, size), keys).sum()) for rank in range(size)}
    assert len(work) == 1


def test_decoding_takes_the_last_rows_of_the_whole_mask():
    whole = attention_mask(torch.arange(9), torch.arange(9), window=4)
    assert torch.equal(attention_mask(torch.arange(7, 9), torch.arange(9), window=4), whole[:, :, 7:])
