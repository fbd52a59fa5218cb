"""From `.bin/.idx` to samples: blends, epochs, splits, the index cache, and what is refused."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.synthetic import random_documents, tiny_corpus, write_corpus
from vishwamai_mp.config import ConfigError, DataConfig, ModelConfig, PretrainConfig, TrainingConfig, UserError
from vishwamai_mp.data.batches import evaluation_batches, evaluation_stream, train_stream
from vishwamai_mp.data.blends import identify
from vishwamai_mp.data.datasets import build_datasets
from vishwamai_mp.data.position import DataPosition

VOCAB, LENGTH = 300, 16


def built(*arguments: Any) -> Any:
    """Data sets of `.bin/.idx` files, which know more of themselves than a protocol says."""
    return build_datasets(*arguments)


@dataclass
class _Tokenizer:
    vocab_size: int = VOCAB
    eod_id: int = 0


def _config(train, *, training=None, vocab_size=VOCAB, **data):
    data.setdefault("split", "100,0,0")
    return PretrainConfig(
        model=ModelConfig(vocab_size=vocab_size),
        data=DataConfig(train=train, **data),
        training=replace(TrainingConfig(sequence_length=LENGTH, global_batch_size=4), **(training or {})),
    )


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("books"), VOCAB, 4000, seed=1)


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("code"), VOCAB, 2000, seed=2)


def _texts(samples, start, stop):
    return [tuple(samples[n].tolist()) for n in range(start, stop)]


def _files(folder):
    return sorted(path.relative_to(folder) for path in Path(folder).rglob("*"))


# --- samples of corpora


def test_an_epoch_is_every_sample_once_and_the_next_has_another_order(books, tmp_path):
    train = built(_config(books, cache_dir=str(tmp_path))).train
    size = train.samples_per_epoch
    first, second, third = (_texts(train, e * size, (e + 1) * size) for e in range(3))
    tokens = np.memmap(f"{books}.bin", dtype=np.uint16)
    assert size == (len(tokens) - 1) // LENGTH
    assert len(set(first)) == size
    assert set(first) == set(second) == set(third)
    assert first != second != third != first


def test_samples_are_the_concatenated_documents(tmp_path):
    documents = random_documents(VOCAB, 3000, seed=4)
    prefix = write_corpus(tmp_path / "text", documents)
    train = built(_config(prefix)).train
    joined = b"".join(document.astype("<i4").tobytes() for document in documents)
    for text in _texts(train, 0, 40):
        pieces = np.split(np.array(text, dtype="<i4"), np.flatnonzero(np.array(text) == 0) + 1)
        assert all(piece.tobytes() in joined for piece in pieces)  # each part of a document, whole and in order


def test_the_order_does_not_depend_on_the_length_of_the_run(books, code, tmp_path):
    blend = [0.7, books, 0.3, code]
    short = built(_config(blend, cache_dir=str(tmp_path / "a"), training={"max_steps": 3}))
    long = built(_config(blend, cache_dir=str(tmp_path / "b"), training={"max_steps": 3000}))
    assert _texts(short.train, 0, 600) == _texts(long.train, 0, 600)
    assert short.fingerprint == long.fingerprint


def test_the_seed_decides_the_order(books, tmp_path):
    orders = [
        _texts(built(_config(books, cache_dir=str(tmp_path), training={"seed": seed})).train, 0, 50)
        for seed in (1, 2, 1)
    ]
    assert orders[0] == orders[2] != orders[1]


def test_a_blend_draws_by_weight_and_says_how_many_epochs(books, code, tmp_path):
    config = _config([3.0, books, 1.0, code], cache_dir=str(tmp_path), training={"max_steps": 100})
    datasets = built(config)
    alone = built(_config(code, cache_dir=str(tmp_path))).train
    of_code = set(_texts(alone, 0, alone.samples_per_epoch))
    drawn = _texts(datasets.train, 0, 400)
    assert sum(text in of_code for text in drawn) == 100
    assert datasets.fingerprint.shares == pytest.approx((0.75, 0.25), abs=1e-5)
    size = alone.samples_per_epoch
    assert (
        f"25.0% of 400 samples of {LENGTH} tokens, {100 / size:.2f} epochs of {size:,} samples"
        in datasets.epochs(config.training)[1]
    )


def test_splits_are_disjoint_documents(tmp_path):
    documents = [[k + 1] * 60 + [0] for k in range(200)]
    prefix = write_corpus(tmp_path / "text", documents)
    datasets = built(_config(prefix, split="80,15,5"))
    assert datasets.valid is not None
    assert datasets.test is not None
    found = [
        {token for text in _texts(part, 0, part.samples_per_epoch) for token in text} - {0}
        for part in (datasets.train, datasets.valid, datasets.test)
    ]
    assert found[0] <= set(range(1, 161))
    assert found[1] <= set(range(161, 191))
    assert found[2] <= set(range(191, 201))
    assert all(len(tokens) >= 9 for tokens in found)


def test_validation_data_of_its_own_leaves_training_whole(books, code, tmp_path):
    datasets = built(_config(books, valid=code, split="90,10", cache_dir=str(tmp_path)))
    assert datasets.valid is not None
    assert datasets.test is None
    whole = built(_config(books, cache_dir=str(tmp_path)))
    assert datasets.train.samples_per_epoch == whole.train.samples_per_epoch
    assert datasets.valid.samples_per_epoch == built(_config(code, cache_dir=str(tmp_path))).train.samples_per_epoch
    assert datasets.fingerprint.split is None
    assert any("data.split=90,10 has no effect" in note for note in datasets.notes)


def test_a_small_corpus_is_left_out_of_validation_and_that_is_said(books, tmp_path):
    small = write_corpus(tmp_path / "small", [[5] * 30])
    datasets = built(_config([books, small], split="90,10", cache_dir=str(tmp_path / "cache")))
    assert datasets.valid is not None
    assert len(datasets.valid.corpora) == 1
    assert any(f"{small} has 0 tokens for valid" in note and "left out of valid" in note for note in datasets.notes)


# --- the index cache


def test_the_cache_lies_beside_the_first_file_and_is_used_again(tmp_path):
    prefix = tiny_corpus(tmp_path, VOCAB, 1000, seed=3)
    built(_config(prefix))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(files) == 3
    built(_config(prefix, training={"max_steps": 7}))
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}


def test_a_corpus_written_anew_under_its_name_gets_new_indices(tmp_path):
    prefix = write_corpus(tmp_path / "text", [[1] * 50] * 20)
    built(_config(prefix))
    write_corpus(tmp_path / "text", [[2] * 25] * 20)
    train = built(_config(prefix)).train
    assert train.samples_per_epoch == (500 - 1) // LENGTH
    assert set(_texts(train, 0, train.samples_per_epoch)) == {(2,) * (LENGTH + 1)}


@pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_indices_are_built_again(tmp_path, name, damage):
    prefix = tiny_corpus(tmp_path, VOCAB, 1000, seed=3)
    before = _texts(built(_config(prefix)).train, 0, 50)
    file = next((tmp_path / "cache").rglob(f"{name}.npy"))
    file.write_bytes(file.read_bytes()[:-20]) if damage == "cut" else file.unlink()
    names = _files(tmp_path / "cache")
    assert _texts(built(_config(prefix)).train, 0, 50) == before
    assert len(_files(tmp_path / "cache")) == len(names) + (damage == "gone")


def _build_and_read(prefix, count):
    from vishwamai_mp.config import ParallelConfig, resolve
    from vishwamai_mp.runtime import initialize, shutdown

    config = resolve(replace(_config(prefix, split="80,20"), parallel=ParallelConfig(), precision="fp32"))
    runtime = initialize(config)
    try:
        datasets = built(config, _Tokenizer(), runtime)
        stream = train_stream(config, datasets, runtime)
        rows = [next(stream).tokens[0].tolist() for _ in range(count)]
        held_out = [batch.tokens[0].tolist() for batch in evaluation_stream(config, datasets, runtime)]
    finally:
        shutdown(keep_world=True)
    return rows, held_out


def test_two_ranks_share_one_cache_and_every_layout_sees_the_same(workers, tmp_path):
    prefix = tiny_corpus(tmp_path, VOCAB, 4000, seed=6)
    (left, left_out), (right, right_out) = workers.run(_build_and_read, 2, prefix, 6)
    assert sorted(p.name.rsplit("-", 2)[1] for p in (tmp_path / "cache").iterdir()) == ["train", "valid"]
    [(alone, alone_out)] = workers.run(_build_and_read, 1, prefix, 12)
    interleaved = [row for pair in zip(left, right, strict=True) for row in pair]
    assert interleaved == alone
    assert [row for pair in zip(left_out, right_out, strict=True) for row in pair] == alone_out
    assert len(alone_out) == 4 * 8


def _build_alone(prefix):
    return _texts(built(_config(prefix)).train, 0, 20)


def test_jobs_that_start_at_once_build_one_cache(workers, tmp_path):
    prefix = tiny_corpus(tmp_path, VOCAB, 4000, seed=6)
    first, second = workers.run(_build_alone, 2, prefix)
    assert first == second == _build_alone(prefix)
    [folder] = (tmp_path / "cache").iterdir()
    assert len(list(folder.iterdir())) == 3


def test_every_rank_raises_what_the_first_found(workers, tmp_path):
    with pytest.raises(UserError, match="no data file"):
        workers.run(_build_and_read, 2, str(tmp_path / "nothing"), 1)


def test_an_evaluation_reads_no_more_than_an_epoch(books, tmp_path):
    valid = built(_config(books, split="90,10", cache_dir=str(tmp_path))).valid
    assert valid is not None
    whole = valid.samples_per_epoch // 4
    assert evaluation_batches(_config(books, training={"evaluate_batches": 3}), valid) == 3
    assert evaluation_batches(_config(books, training={"evaluate_batches": 999}), valid) == whole
    assert evaluation_batches(_config(books, training={"global_batch_size": 10_000}), valid) == 1


# --- identity


def test_a_moved_corpus_is_the_same_and_a_changed_byte_is_not(books, tmp_path):
    moved = str(tmp_path / Path(books).name)
    for suffix in (".bin", ".idx"):
        shutil.copy(books + suffix, moved + suffix)
    stored = DataPosition(40, built(_config(books)).fingerprint)
    assert stored.changes(built(_config(moved)).fingerprint) == []
    data = bytearray(Path(moved + ".bin").read_bytes())
    data[-2] ^= 1
    Path(moved + ".bin").write_bytes(data)
    assert identify(moved) != identify(books)
    [sentence] = stored.changes(built(_config(moved)).fingerprint)
    assert "holds other data than before" in sentence


# --- what is refused


def _refused(config, message, tokenizer=None, kind=UserError):
    with pytest.raises(kind, match=message) as caught:
        built(config, tokenizer)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit(books):
    _refused(_config(None), "data.train is not set", kind=ConfigError)
    _refused(_config(books), "model.vocab_size=300 but the tokenizer", _Tokenizer(vocab_size=301), ConfigError)
    _refused(_config(books, eod_mask_loss=True), "data.eod_mask_loss=true needs a tokenizer", kind=ConfigError)
    _refused(_config(books, reset_position_ids=True), "needs a tokenizer", _Tokenizer(eod_id=-1), ConfigError)
    _refused(_config(books, training={"evaluate_every": 5}), "leaves validation less than one", kind=ConfigError)


def test_a_corpus_of_few_documents_cannot_be_split(tmp_path):
    write_corpus(tmp_path / "one", [np.arange(200)])
    write_corpus(tmp_path / "one_marks", [np.arange(200)])  # as prepared rows have them
    cause = "corpora are split between documents and .*one has only 1 .*--split-documents-at blank-lines"
    one, evaluated = str(tmp_path / "one"), {"evaluate_every": 5}
    _refused(
        _config(one, split="90,10,0", training=evaluated), f"less than one sequence, for {cause}", kind=ConfigError
    )
    _refused(
        _config(one, split="90,10,0", prepared_rows=True, training={"evaluate_every": 5, "sequence_length": 199}),
        "less than one sequence, for .*one has only 1 row; raise",
        kind=ConfigError,
    )
    _refused(_config(one, split="40,60,0", training=evaluated), f"0 tokens for train.*, for {cause}")


def test_files_that_cannot_be_read(books, tmp_path):
    _refused(_config(str(tmp_path / "nothing")), "no data file")
    for suffix in (".bin", ".idx"):
        prefix = str(tmp_path / f"broken{suffix[1:]}")
        for other in (".bin", ".idx"):
            shutil.copy(books + other, prefix + other)
        with Path(prefix + suffix).open("rb+") as file:
            file.truncate(100)
        _refused(_config(prefix), "100 bytes")
        Path(prefix + suffix).write_bytes(b"")
        _refused(_config(prefix), "is empty")
    assert not (tmp_path / "cache").exists()


def test_too_few_tokens(tmp_path):
    prefix = write_corpus(tmp_path / "short", [[1] * LENGTH])
    _refused(_config(prefix), f"has {LENGTH} tokens for train, fewer than one sequence")
    assert built(_config(write_corpus(tmp_path / "enough", [[1] * (LENGTH + 1)]))).train.samples_per_epoch == 1


def test_a_token_outside_the_vocabulary(books):
    _refused(_config(books, vocab_size=299), r"holds token 299 but model.vocab_size=299")


def test_documents_without_their_end(tmp_path):
    prefix = write_corpus(tmp_path / "text", [[1] * 50] * 3)
    _refused(_config(prefix, reset_attention_mask=True), "do not end with the end-of-document token 0", _Tokenizer())


def test_a_cache_that_cannot_be_written(books, tmp_path):
    file = tmp_path / "file"
    file.touch()
    _refused(_config(books, cache_dir=str(file / "cache")), "cannot write shuffle indices .* set data.cache_dir")
