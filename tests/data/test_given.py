"""Datasets that a program hands over: what becomes of their items, and in which order they come."""

from typing import Any

import numpy as np
import pytest
import torch

from vishwamai_mp.config import ConfigError, UserError, load_config, resolve
from vishwamai_mp.data.batches import DocumentRules, make_batch
from vishwamai_mp.data.given import GivenSamples, StreamedSamples, given_datasets, is_stream
from vishwamai_mp.data.items import ItemEncoder
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer

_T = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(
        ["the quick brown fox jumps over the lazy dog " * 40], 380, tmp_path_factory.mktemp("tokenizer") / "spm"
    )


def encoder(tokenizer: Tokenizer | None = None, vocab_size: int = 50) -> ItemEncoder:
    return ItemEncoder(_T, vocab_size, tokenizer)


def learnt(item: Any, tokenizer: Tokenizer | None = None, vocab_size: int = 50) -> list[tuple[int, int]]:
    """(place read at, token to be predicted) of each prediction that counts."""
    row = encoder(tokenizer, vocab_size).row(item, "item")
    batch = make_batch(row[None], DocumentRules(marked=True))
    assert batch.document_ids is None
    return [(place, int(batch.labels[0, place])) for place in batch.loss_mask[0].nonzero()[:, 0].tolist()]


@pytest.mark.parametrize(
    "item",
    [
        [5, 6, 7],
        (5, 6, 7),
        np.array([5, 6, 7], np.uint16),
        torch.tensor([5, 6, 7], dtype=torch.int32),
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [5, 6, 7, 0], "labels": [5, 6, 7, -100]},
        {"input_ids": torch.tensor([5, 6, 7]), "labels": np.array([-100, 6, 7])},
    ],
)
def test_each_token_after_the_first_is_predicted(item):
    assert learnt(item) == [(0, 6), (1, 7)]


def test_labels_choose_what_is_learnt():
    assert learnt({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, -100, 9]}) == [(1, 7), (3, 9)]


def test_a_row_has_room_for_one_token_more_than_is_read():
    assert learnt(list(range(1, 8))) == [(i, i + 2) for i in range(6)]
    assert learnt(list(range(1, 12))) == [(i, i + 2) for i in range(6)]
    assert learnt(list(range(1, 7))) == [(i, i + 2) for i in range(5)]


def test_texts_end_with_the_end_of_document_token(tokenizer):
    ids = tokenizer.encode("a b")
    found = learnt("a b", tokenizer, 380)
    assert found == learnt({"text": "a b"}, tokenizer, 380)
    assert [token for _, token in found] == [*ids[1:], tokenizer.eod_id]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([5, 50], "item holds token 50 but model.vocab_size=50"),
        ([5, -1], "item holds token -1"),
        ([5.0, 6.0], "item is no list of token ids"),
        ([[5], [6]], "item is no list of token ids"),
        (["a", "b"], "item is no list of token ids"),
        (7, "item is a int"),
        ("text", "item is a text, which needs a tokenizer; set data.tokenizer"),
        ({"ids": [5]}, "item has neither 'input_ids' nor a 'text' (keys: ids)"),
        ({"input_ids": [5, 6], "labels": [5]}, "item: 1 labels for 2 input_ids"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "not to be shifted"),
    ],
)
def test_what_is_no_item(item, message):
    with pytest.raises(UserError) as error:
        encoder().row(item, "item")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def order(samples: Any, places: range) -> list[int]:
    """First tokens of samples; 0: a row of which nothing is learnt."""
    rows = [samples[place] for place in places]
    return [int(row[0, 0]) * int(row[1].any()) for row in rows]


def items(count: int) -> list[list[int]]:
    return [[1 + i, 2] for i in range(count)]


def test_every_epoch_has_each_item_once_in_its_own_order_and_ends_with_a_whole_batch():
    samples = GivenSamples(items(10), encoder(), global_batch_size=4, seed=3, name="data")
    assert samples.samples_per_epoch == 12
    epochs = [order(samples, range(12 * e, 12 * e + 12)) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch[:10]) == list(range(1, 11))
        assert epoch[10:] == [0, 0]
    assert epochs[0] != epochs[1] != epochs[2]
    again = GivenSamples(items(10), encoder(), global_batch_size=4, seed=3, name="data")
    assert order(again, range(36)) == [item for epoch in epochs for item in epoch]
    other = GivenSamples(items(10), encoder(), global_batch_size=4, seed=4, name="data")
    assert order(other, range(12)) != epochs[0]
    kept = GivenSamples(items(10), encoder(), global_batch_size=4, seed=None, name="data")
    assert order(kept, range(20)) == [*range(1, 11), 0, 0, *range(1, 9)]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, count: int) -> None:
        self.count, self.passes = count, 0

    def __iter__(self):
        self.passes += 1
        yield from items(self.count)


def test_a_stream_comes_in_its_order_over_and_over():
    stream = Stream(5)
    samples = StreamedSamples(stream, encoder(), name="data")
    assert order(samples, range(12)) == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    assert stream.passes == 3
    assert order(StreamedSamples(Stream(5), encoder(), name="data"), range(1, 12, 3)) == [2, 5, 3, 1]
    assert order(samples, range(3, 5)) == [4, 5]  # begun again


def test_a_generator_serves_one_pass():
    samples = StreamedSamples((item for item in items(3)), encoder(), name="data")
    assert order(samples, range(3)) == [1, 2, 3]
    with pytest.raises(UserError, match="data ended after 3 items and gives none when it is read again"):
        samples[3]


def test_what_is_a_stream():
    assert is_stream(Stream(1))
    assert is_stream(iter([]))
    assert not is_stream([])
    assert not is_stream(torch.utils.data.TensorDataset(torch.zeros(3)))


def build(train: Any, valid: Any = None, tokenizer: Tokenizer | None = None, **data: Any):
    model = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 50}
    training = {"sequence_length": _T, "global_batch_size": 4}
    config = resolve(load_config({"model": model, "training": training, "data": data}))
    return given_datasets(config, train, valid, tokenizer)


def test_notes_say_what_is_cut_and_what_is_wasted():
    assert build([[1, 2, 3, 4, 5, 6]]).notes == []
    assert "items of up to 9 tokens are cut to training.sequence_length + 1 = 7" in build([[1] * 9]).notes[0]
    assert "items have 2 tokens on average and rows 7" in build(items(10)).notes[0]
    assert "read in its own order" in build(Stream(3)).notes[0]


def test_the_fingerprint_recognises_the_items():
    first = build(items(10)).fingerprint
    assert build(items(10)).fingerprint == first
    assert build(items(11)).fingerprint != first
    assert build([*items(9), [7, 7]]).fingerprint != first


@pytest.mark.parametrize(
    ("train", "valid", "data", "message"),
    [
        ([], None, {}, "train_dataset is empty"),
        ([[1, 2]], [], {}, "eval_dataset is empty"),
        ([[1, 2]], Stream(3), {}, "eval_dataset has no length"),
        ({"train": [[1, 2]]}, None, {}, "train_dataset is a dict of datasets (train)"),
        (7, None, {}, "train_dataset=7"),
        ([[1, 2]], None, {"eod_mask_loss": True}, "data.eod_mask_loss=true is for .bin/.idx files"),
    ],
)
def test_datasets_that_cannot_be_used(train, valid, data, message):
    with pytest.raises(UserError) as error:
        build(train, valid, **data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_tokenizer_must_be_the_models(tokenizer):
    with pytest.raises(ConfigError, match=r"model.vocab_size=50 but the tokenizer .* has 380 tokens"):
        build(["a b"], None, tokenizer)
