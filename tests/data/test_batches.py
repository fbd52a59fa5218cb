"""The stream: each sample exactly once at any layout and after any resume; document boundaries; context parallelism."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)
from tests.training.layouts import SMALL, RandomSamples
from vishwamai_mp.config import UserError, load_config, resolve
from vishwamai_mp.data.batches import (
    BatchStream,
    DocumentRules,
    context_shard,
    context_unshard,
    make_batch,
    train_stream,
)
from vishwamai_mp.model.masks import document_bounds

# isort: split
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

GLOBAL_BATCH = 24


class _Numbers(torch.utils.data.Dataset):
    """Sample n is [n, n + 1, n + 2]."""

    def __getitem__(self, index):
        return torch.arange(index, index + 3)


def _stream(start=0, micro=2, rank=0, ranks=1, **more):
    more.setdefault("global_batch_size", GLOBAL_BATCH)
    return BatchStream(
        _Numbers(),
        micro_batch_size=micro,
        data_rank=rank,
        data_parallel_size=ranks,
        consumed_samples=start,
        **more,
    )


def _read(batches, start, micro, ranks, **more):
    """What all ranks see in `batches` global batches, and the position after each, which all must agree on."""
    streams = [_stream(start, micro, rank, ranks, **more) for rank in range(ranks)]
    seen = []
    for _ in range(batches):
        numbers = []
        for stream in streams:
            for _ in range(stream.micro_batches_per_step):
                numbers += next(stream).tokens[:, 0].tolist()
        seen.append(sorted(numbers))
    positions = {stream.consumed_samples for stream in streams}
    assert len(positions) == 1
    return seen, positions.pop()


_LAYOUTS = [(micro, ranks) for micro, ranks in itertools.product(range(1, 13), repeat=2) if not 24 % (micro * ranks)]


@given(st.lists(st.tuples(st.sampled_from(_LAYOUTS), st.integers(1, 3)), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_each_global_batch_is_its_samples_once_over_any_sequence_of_layouts(runs):
    position, seen = 0, []
    for (micro, ranks), batches in runs:
        read, position = _read(batches, position, micro, ranks)
        seen += read
    total = sum(batches for _, batches in runs)
    assert seen == [list(range(n * GLOBAL_BATCH, (n + 1) * GLOBAL_BATCH)) for n in range(total)]
    assert position == total * GLOBAL_BATCH


def test_a_resume_with_another_global_batch_size_continues_where_it_was():
    first, position = _read(3, 0, 2, 2)
    second, position = _read(2, position, 5, 2, global_batch_size=10)
    assert list(itertools.chain(*first, *second)) == list(range(3 * 24 + 20))
    assert position == 92


def test_the_position_moves_only_with_whole_global_batches():
    stream = _stream(start=7, micro=2, rank=0, ranks=4)
    positions = []
    for _ in range(7):
        next(stream)
        positions.append(stream.consumed_samples)
    assert positions == [7, 7, 31, 31, 31, 55, 55]


def test_worker_processes_change_nothing():
    with_workers = _stream(start=24, micro=3, rank=1, ranks=2, num_workers=2)
    alone = _stream(start=24, micro=3, rank=1, ranks=2)
    for _ in range(10):
        assert torch.equal(next(with_workers).tokens, next(alone).tokens)
    assert with_workers.consumed_samples == alone.consumed_samples == 24 + 2 * 24


def test_reading_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(_stream())
    assert torch.equal(torch.rand(3), expected)


def test_a_stopped_stream_ends_with_the_last_whole_global_batch():
    assert len(list(_stream(micro=4, rank=1, ranks=2, stop_samples=71))) == 2 * 3
    assert _read(2, 0, 4, 2, stop_samples=48)[1] == 48


def test_a_token_outside_the_vocabulary_is_refused():
    stream = _stream(micro=2, vocab_size=5)
    assert next(stream).labels.max() == 3
    with pytest.raises(UserError, match=r"token 5 but model.vocab_size=5"):
        next(stream)


def _oracle(row, eod):
    """Document number and position of each token, and whether its loss counts, one token at a time."""
    documents, positions, counts = [], [], []
    document = position = 0
    for token in row:
        documents.append(document)
        positions.append(position)
        counts.append(float(token != eod))
        position += 1
        if token == eod:
            document, position = document + 1, 0
    return documents, positions, counts


@given(st.lists(st.lists(st.integers(0, 3), min_size=13, max_size=13), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_document_boundaries_are_those_of_a_loop_and_of_megatron_core(rows):
    text = torch.tensor(rows)
    batch = make_batch(text, DocumentRules(0, True, True, True))
    assert batch.document_ids is not None
    for i, row in enumerate(rows):
        documents, positions, counts = _oracle(row[:-1], 0)
        assert batch.tokens[i].tolist() == row[:-1]
        assert batch.labels[i].tolist() == row[1:]
        assert batch.document_ids[i].tolist() == documents
        assert batch.position_ids[i].tolist() == positions
        assert batch.loss_mask[i].tolist() == counts
        hidden, loss_mask, position_ids = _get_ltor_masks_and_position_ids(text[i, :-1], 0, True, True, True, True)
        assert torch.equal(batch.position_ids[i], position_ids)
        assert torch.equal(batch.loss_mask[i], loss_mask)
        ids = batch.document_ids[i]
        sees = (ids[:, None] == ids[None, :]) & torch.ones(12, 12).tril().bool()
        assert torch.equal(sees, ~hidden[0])


@pytest.mark.parametrize("rule", ["reset_attention_mask", "reset_position_ids", "eod_mask_loss"])
def test_each_rule_does_its_own_part_only(rule):
    text = torch.tensor([[5, 0, 6, 0, 7]])
    plain = make_batch(text, DocumentRules(0))
    assert plain.position_ids.tolist() == [[0, 1, 2, 3]]
    assert plain.loss_mask.tolist() == [[1, 1, 1, 1]]
    assert plain.document_ids is None
    batch = make_batch(text, DocumentRules(0, **{rule: True}))
    changed = {
        "reset_attention_mask": batch.document_ids is not None and batch.document_ids.tolist() == [[0, 0, 1, 1]],
        "reset_position_ids": batch.position_ids.tolist() == [[0, 1, 0, 1]],
        "eod_mask_loss": batch.loss_mask.tolist() == [[1, 0, 1, 0]],
    }
    assert [name for name, differs in changed.items() if differs] == [rule]


def test_a_stream_knows_where_documents_end():
    batch = next(_stream(start=3, rules=DocumentRules(eod_id=4, reset_attention_mask=True)))
    assert batch.tokens.tolist() == [[3, 4], [4, 5]]
    assert batch.bounds.places.tolist() == [0, 2, 3, 4]
    assert batch.bounds.longest == 2
    assert next(_stream()).bounds is None


def test_a_runs_stream_knows_the_parts_of_its_context_parallel_rank():
    context = ["data.reset_attention_mask=true", "parallel.context_parallel_size=2"]
    config = resolve(load_config(SMALL, context), 2)
    cp = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    place = {"data_rank": 0, "data_parallel_size": 1, "device": torch.device("cpu")}
    runtime: Any = SimpleNamespace(groups=SimpleNamespace(cp=cp), **place)
    datasets: Any = SimpleNamespace(train=RandomSamples(250, 32), eod_id=0)
    batch: Any = next(train_stream(config, datasets, runtime))
    expected: Any = document_bounds(batch.document_ids, 1, 2)
    assert torch.equal(batch.bounds.keys, expected.keys)
    assert batch.bounds.longest_keys == expected.longest_keys


def test_batches_have_the_documented_types():
    batch = make_batch(torch.zeros(2, 5, dtype=torch.int64), DocumentRules(0, True, True, True))
    assert batch.verdicts is None
    assert batch.bounds is None
    names = batch.__dataclass_fields__.keys() - {"verdicts", "bounds"}
    types = {name: getattr(batch, name).dtype for name in names}
    assert types == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
        "document_ids": torch.int32,
    }
    assert all(getattr(batch, name).shape == (2, 4) for name in types)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_context_shards_are_zigzag_and_come_together_again(size, dim):
    whole = torch.arange(2 * 24).reshape(2, 24)
    whole = whole.T if dim == 0 else whole
    shards = [context_shard(whole, rank, size, dim) for rank in range(size)]
    assert torch.equal(context_unshard(shards, dim), whole)
    if size > 1:
        step = 24 // (2 * size)
        for rank, shard in enumerate(shards):
            first, second = rank * step, (2 * size - 1 - rank) * step
            expected = [*range(first, first + step), *range(second, second + step)]
            assert shard.select(1 - dim, 0).tolist() == expected
