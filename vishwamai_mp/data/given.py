"""Datasets that a program hands over, in place of `.bin/.idx`: map-style, or read in order.

Shapes: N items, G sequences of a global batch, T tokens of a sequence.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from vishwamai_mp.config import ConfigError, PretrainConfig, UserError
from vishwamai_mp.config.extensions import find_extension, is_own
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.blends import SourceIdentity
from vishwamai_mp.data.datasets import Datasets, build_datasets
from vishwamai_mp.data.items import ItemEncoder
from vishwamai_mp.data.order import permute
from vishwamai_mp.data.position import DataFingerprint
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.runtime import Runtime

_LOOKED_AT = 64  # items, spread over a dataset, that recognise it and tell how long items are


class GivenSamples(torch.utils.data.Dataset):
    """Endless samples of a map-style dataset, each epoch in an order of its own.

    An epoch ends with a whole global batch: rows of which nothing is learnt fill it up, so that the loss of the last
    step is that of the items that were left.

    Args:
        items: with `len()` and items under 0 … N − 1.
        encoder: of items.
        global_batch_size: G.
        seed: of the order; None: the dataset's own.
        name: for messages.
    """

    def __init__(
        self, items: Any, encoder: ItemEncoder, *, global_batch_size: int, seed: int | None, name: str
    ) -> None:
        self._items, self._encoder, self._seed, self._name = items, encoder, seed, name
        self._count = len(items)
        if not self._count:
            raise UserError(f"{name} is empty; give it at least one item")
        self.samples_per_epoch = math.ceil(self._count / global_batch_size) * global_batch_size

    def __getitem__(self, index: int) -> torch.Tensor:
        epoch, place = divmod(index, self.samples_per_epoch)
        if place >= self._count:
            return self._encoder.empty()
        if self._seed is not None:
            place = permute(place, self._count, self._seed * 1_000_003 + epoch)
        return self._encoder.row(self._items[place], f"{self._name}[{place}]")


class StreamedSamples(torch.utils.data.Dataset):
    """Samples of a dataset that can only be read in order; after its end it is read again.

    Each rank, and each of its workers, reads the whole stream, encodes its own items and lets the others go; so does
    a resumed run up to where it was. A number below the last makes it begin again.

    Args:
        items: an iterable that gives the same items each time.
        encoder: of items.
        name: for messages.
    """

    def __init__(self, items: Iterable[Any], encoder: ItemEncoder, *, name: str) -> None:
        self._items, self._encoder, self._name = items, encoder, name
        self._reading: Iterator[Any] | None = None
        self._read = 0  # items so far

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._reading is None or index < self._read:
            self._reading, self._read = self._endless(), 0
        item = None
        while self._read <= index:
            item = next(self._reading)
            self._read += 1
        return self._encoder.row(item, f"{self._name}: item {index}")

    def _endless(self) -> Iterator[Any]:
        before = -1
        while self._read > before:
            before = self._read
            yield from self._items
        raise UserError(
            f"{self._name} ended after {counted(self._read, 'item')} and gives none when it is read again; give a list"
            " or a dataset that does, or train for fewer steps"
        )


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be read in order."""
    return isinstance(dataset, torch.utils.data.IterableDataset) or not (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    )


def run_datasets(config: PretrainConfig, tokenizer: Tokenizer | None, runtime: Runtime | None) -> Datasets:
    """The data that the configuration asks for: `.bin/.idx` files, or what the user's own `data.source` gives.

    All ranks call it together, and each calls the user's function.

    Raises:
        UserError, ConfigError: as `build_datasets` and `given_datasets`, or there is no such function.
    """
    if not is_own(config.data.source):
        return build_datasets(config, tokenizer, runtime)
    found = find_extension("data.source", config.data.source, 2)(config, tokenizer)
    if not (isinstance(found, tuple) and len(found) == 2):
        raise ConfigError(f"data.source={config.data.source} returned {type(found).__name__}: return (train, valid)")
    return given_datasets(config, *found, tokenizer)


def given_datasets(config: PretrainConfig, train: Any, valid: Any, tokenizer: Tokenizer | None) -> Datasets:
    """The data of a run, from datasets of token ids or texts (`items.ItemEncoder` says which).

    Args:
        config: resolved.
        train: map-style (`len()` and numbers), shuffled by `training.seed`; or an iterable, read in its own order.
        valid: map-style, read whole at each evaluation if `training.evaluate_batches` is enough; or None.
        tokenizer: for texts.

    Raises:
        UserError: an empty dataset, or items that are none.
        ConfigError: a kind of dataset, or a setting of `data`, that this cannot be done with.
    """
    _check(config, train, valid, tokenizer)
    training = config.training
    encoder = ItemEncoder(training.sequence_length, config.model.vocab_size, tokenizer)
    size = training.global_batch_size
    notes = []
    samples: GivenSamples | StreamedSamples
    if is_stream(train):
        samples, digest, count = StreamedSamples(train, encoder, name="train_dataset"), "", 0
        notes.append("train_dataset is read in its own order, by every rank; resuming reads up to where the run was")
    else:
        samples = GivenSamples(train, encoder, global_batch_size=size, seed=training.seed, name="train_dataset")
        digest, count = _digest(train, encoder), len(train)
        notes += _length_notes(train, encoder)
    held_out = None
    if valid is not None:
        held_out = GivenSamples(valid, encoder, global_batch_size=size, seed=None, name="eval_dataset")
    identity = SourceIdentity(f"train_dataset ({type(train).__name__})", count, 0, digest)
    fingerprint = DataFingerprint((identity,), (1.0,), training.sequence_length, None, training.seed)
    return Datasets(samples, held_out, None, -1 if tokenizer is None else tokenizer.eod_id, fingerprint, notes)


def _check(config: PretrainConfig, train: Any, valid: Any, tokenizer: Tokenizer | None) -> None:
    data = config.data
    for name, dataset in (("train_dataset", train), ("eval_dataset", valid)):
        if isinstance(dataset, Mapping):
            keys = ", ".join(map(str, dataset))
            raise ConfigError(f"{name} is a dict of datasets ({keys}); give one of them, {name}[...]")
    if not isinstance(train, Iterable) and not hasattr(train, "__getitem__"):
        raise ConfigError(f"train_dataset={train!r}: use a .bin/.idx prefix, a dataset with items, or an iterable")
    if valid is None and config.training.evaluate_every:
        raise ConfigError(
            f"training.evaluate_every={config.training.evaluate_every} without validation data; give an eval_dataset,"
            " or leave it out"
        )
    if valid is not None and is_stream(valid):
        raise ConfigError("eval_dataset has no length, and every evaluation reads the same items; give a list of some")
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} but the tokenizer {data.tokenizer} has"
            f" {tokenizer.vocab_size} tokens; set model.vocab_size={tokenizer.vocab_size}"
        )
    for key in ("consecutive", "prepared_rows", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        if getattr(data, key):
            raise ConfigError(f"data.{key}=true is for .bin/.idx files; of train_dataset each item is a row: set false")


def _some(items: Any) -> list[int]:
    """Numbers of a few items, the first and the last among them."""
    last = len(items) - 1
    return sorted({round(last * step / (_LOOKED_AT - 1)) for step in range(_LOOKED_AT)})


def _digest(items: Any, encoder: ItemEncoder) -> str:
    """Recognises a dataset by some of its items."""
    digest = hashlib.blake2b(digest_size=16)
    for place in _some(items):
        digest.update(encoder.row(items[place], f"train_dataset[{place}]").numpy().tobytes())
    return digest.hexdigest()


def _length_notes(items: Any, encoder: ItemEncoder) -> list[str]:
    lengths = [encoder.length(items[place], f"train_dataset[{place}]") for place in _some(items)]
    room = encoder.sequence_length + 1
    notes = []
    if max(lengths) > room:
        notes.append(
            f"train_dataset: items of up to {max(lengths)} tokens are cut to training.sequence_length + 1 = {room};"
            " cut them yourself, or preprocess them to .bin/.idx, and nothing is lost"
        )
    mean = sum(lengths) / len(lengths)
    if mean < 0.5 * room:
        notes.append(
            f"train_dataset: items have {mean:.0f} tokens on average and rows {room}: most of the work is on filling;"
            " shorten training.sequence_length, or preprocess to .bin/.idx"
        )
    return notes
