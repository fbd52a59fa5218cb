"""Indexed files: bytes against megatron-core's own builder, and every kind of damage with its message."""

import os
import struct
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.data.indexed import IndexedWriter, check_indexed, token_dtype

DOCUMENTS = [[1, 2, 3], [], [65000], list(range(500))]


@pytest.fixture(scope="session")
def megatron_indexed():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def write(prefix, documents, dtype=np.uint16, at_a_time=2):
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for at in range(0, len(documents), at_a_time):
            some = documents[at : at + at_a_time]
            tokens = np.array(list(chain.from_iterable(some)), dtype=dtype).tobytes()
            writer.add(tokens, np.array([len(document) for document in some], dtype=np.int64))
        writer.publish()


def both(prefix):
    return [open(f"{prefix}.{suffix}", "rb").read() for suffix in ("bin", "idx")]


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65499), max_size=20), min_size=1, max_size=30),
    vocab_size=st.sampled_from([65499, 65500, 200_000]),
    at_a_time=st.integers(1, 7),
    chunk=st.integers(1, 9),
)
def test_bytes_are_those_of_megatron_core(tmp_path_factory, megatron_indexed, documents, vocab_size, at_a_time, chunk):
    folder = tmp_path_factory.mktemp("indexed")
    dtype = token_dtype(vocab_size)
    assert dtype == np.dtype(megatron_indexed.DType.optimal_dtype(vocab_size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vishwamai_mp.data.indexed._CHUNK", chunk)
        write(folder / "ours", documents, dtype.type, at_a_time)
    builder = megatron_indexed.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype.type)
    for document in documents:
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(str(folder / "theirs.idx"))
    assert both(folder / "ours") == both(folder / "theirs")


def test_megatron_core_reads_it_back(tmp_path, megatron_indexed):
    write(tmp_path / "pair", DOCUMENTS)
    dataset = megatron_indexed.IndexedDataset(str(tmp_path / "pair"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [d for d in DOCUMENTS if d]


@pytest.mark.parametrize("chunk", [1, 3, 1 << 18])
def test_check_counts_what_is_there(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("vishwamai_mp.data.indexed._CHUNK", chunk)
    write(tmp_path / "pair", DOCUMENTS)
    stats = check_indexed(tmp_path / "pair", vocab_size=65001)
    assert (stats.num_documents, stats.num_sequences, stats.num_tokens, stats.max_token) == (4, 3, 504, 65000)
    assert stats.dtype == np.uint16
    with pytest.raises(UserError, match=r"holds token 65000, but the vocabulary has 65000"):
        check_indexed(tmp_path / "pair", vocab_size=65000)


def test_negative_tokens_are_noticed(tmp_path):
    write(tmp_path / "pair", [[1, -7]], np.int32)
    with pytest.raises(UserError, match="holds token -7"):
        check_indexed(tmp_path / "pair", vocab_size=10)


def patched(at, code, value):
    return lambda data: data[:at] + struct.pack(code, value) + data[at + struct.calcsize(code) :]


def test_the_multimodal_layout_is_called_so(tmp_path):
    write(tmp_path / "pair", DOCUMENTS)
    with (tmp_path / "pair.idx").open("ab") as file:
        file.write(bytes(3))  # a mode for each of the three sequences
    with pytest.raises(UserError, match=r"pair\.idx is of the multimodal layout"):
        check_indexed(tmp_path / "pair")


@pytest.mark.parametrize("given", ["a_text_document.bin", "a_text_document.idx", "a"])
def test_what_is_taken_for_a_prefix_is_told_the_prefix(tmp_path, given):
    write(tmp_path / "a_text_document", DOCUMENTS)
    with pytest.raises(UserError, match=r"no data file .*: did you mean .*/a_text_document\?$"):
        check_indexed(tmp_path / given)
    with pytest.raises(UserError, match=r"give the prefix that tools/preprocess_data\.py printed$"):
        check_indexed(tmp_path / "b")


# In the index of DOCUMENTS: lengths at 34, offsets at 46, document boundaries at 70.
@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("bin", None, r"no data file .*pair\.bin"),
        ("idx", None, r"no data file .*pair\.idx"),
        ("bin", lambda data: b"", r"pair\.bin is empty"),
        ("idx", lambda data: b"", r"pair\.idx is empty"),
        ("bin", lambda data: data[:-2], r"pair\.bin has 1006 bytes but its index promises 1008"),
        ("bin", lambda data: data + b"\0\0", r"pair\.bin has 1010 bytes but its index promises 1008"),
        ("idx", lambda data: data[:-8], r"pair\.idx has 102 bytes but its header promises 110"),
        ("idx", lambda data: data[:20], r"pair\.idx is cut short: 20 bytes"),
        ("idx", lambda data: b"{" + data[1:], r"pair\.idx is not an index file: .*MMIDIDX"),
        ("idx", patched(9, "<Q", 2), "version 2; only version 1"),
        ("idx", patched(17, "<B", 9), "dtype code 9"),
        ("idx", patched(17, "<B", 4), "length and offset of sequence 1 disagree"),
        ("idx", patched(18, "<Q", 1 << 60), "but its header promises"),
        ("idx", patched(34, "<i", -3), "length and offset of sequence 0 disagree"),
        ("idx", patched(34, "<i", 4), "length and offset of sequence 1 disagree"),
        ("idx", patched(42, "<i", 2**31 - 1), r"pair\.bin has 1008 bytes but its index promises"),
        ("idx", patched(46, "<q", 2), "length and offset of sequence 0 disagree"),
        ("idx", patched(70, "<q", 1), "documents do not span its 3 sequences"),
        ("idx", patched(102, "<q", 9), "documents do not span its 3 sequences"),
        ("idx", patched(78, "<q", 3), "document boundaries are out of order"),
    ],
)
def test_damage_is_one_clear_line(tmp_path, suffix, damage, message):
    write(tmp_path / "pair", DOCUMENTS)
    path = tmp_path / f"pair.{suffix}"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        check_indexed(tmp_path / "pair")
    assert "\n" not in str(caught.value)


def test_pair_without_sequences_is_refused(tmp_path):
    write(tmp_path / "pair", [[]])
    (tmp_path / "pair.bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="indexes no tokens"):
        check_indexed(tmp_path / "pair")


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 109), value=st.integers(0, 255))
def test_no_flipped_byte_of_the_index_passes_or_crashes(tmp_path_factory, at, value):
    prefix = tmp_path_factory.mktemp("flip") / "pair"
    write(prefix, DOCUMENTS)
    data = bytearray((prefix.with_suffix(".idx")).read_bytes())
    changed = data[at] != value
    data[at] = value
    prefix.with_suffix(".idx").write_bytes(data)
    if changed and not (78 <= at < 102):  # a boundary inside may move to another valid place
        with pytest.raises(UserError):
            check_indexed(prefix)


def test_leaving_without_publishing_keeps_the_old_pair(tmp_path):
    write(tmp_path / "pair", DOCUMENTS)
    before = both(tmp_path / "pair")
    with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer:
        writer.add(b"\1\0", np.array([1]))
        writer.finish()
        assert len(list(tmp_path.iterdir())) == 4
    assert both(tmp_path / "pair") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair.bin", "pair.idx"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("when", ["add", "finish"])
def test_full_disk_leaves_nothing(tmp_path, when):
    tokens = b"\1\0" * (1 if when == "finish" else 1 << 20)  # a few bytes wait in a buffer until the end

    def fill() -> None:
        with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer, open("/dev/full", "wb") as full:
            writer._tokens.close()
            writer._tokens = full
            writer.add(tokens, np.array([len(tokens) // 2]))
            assert when == "finish"
            try:
                writer.finish()
            finally:
                full.raw.close()

    with pytest.raises(UserError, match="No space left on device; nothing was kept"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"), IndexedWriter(tmp_path / "no" / "x", np.dtype("u2")):
        pass
