"""Text columns of every type in parquet files, and files that unpack to far more than memory should hold."""

import gzip
import sys

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_corpus import bad, parquet_bytes
from tests.data.test_streams import peak_of
from vishwamai_mp.config import UserError
from vishwamai_mp.data import parquet
from vishwamai_mp.data.corpus import CorpusReader, read_documents

TEXTS = ["a", "Ünï \u2028 ☃", "", "a"]
MEBIBYTE = "x" * (1 << 20)


@pytest.mark.parametrize(
    "type_name", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]
)
def test_every_type_of_text(tmp_path, type_name):
    column = pyarrow.array([text.encode() for text in TEXTS], getattr(pyarrow, type_name)())
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(text=column))
    assert list(read_documents([tmp_path / "a.parquet"])) == TEXTS


def test_without_pyarrow_a_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(text=pyarrow.array(TEXTS)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"^reading parquet needs pyarrow, which is not installed: pip install"):
        CorpusReader([tmp_path / "a.parquet"], ["text"])


@pytest.mark.parametrize("type_name", ["string", "large_string", "binary"])
def test_dictionaries(tmp_path, type_name):
    column = pyarrow.array([*TEXTS, None]).cast(getattr(pyarrow, type_name)()).dictionary_encode()
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(text=column))
    assert list(read_documents([tmp_path / "a.parquet"]))[:4] == TEXTS
    assert bad(tmp_path / "a.parquet") == [f"{tmp_path}/a.parquet:row 4: 'text' is null, not a string"]


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_every_encoding_of_text(tmp_path, encoding):
    table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    how = {"use_dictionary": False, "column_encoding": {"text": encoding, "id": "PLAIN"}}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", **how)
    assert list(read_documents([tmp_path / "a.parquet"])) == TEXTS


def test_texts_that_share_their_beginning_are_read_one_by_one(tmp_path):
    table = pyarrow.table({"text": ["x" * (1 << 20)] * 200})  # 200 MiB in a few KB: each row is the row before
    how = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY", "compression": "zstd"}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", **how)
    _, grown = peak_of(tmp_path / "a.parquet")
    assert grown < 100


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(text=pyarrow.array([b"ok", b"\xff\xfe"])))
    assert bad(tmp_path / "a.parquet") == [f"{tmp_path}/a.parquet:row 1: broken UTF-8: byte 0xff at 0"]


@pytest.mark.parametrize("block_bytes", [1, 7, 100, 1 << 20])
def test_blocks_of_any_size_hold_the_same_rows(tmp_path, block_bytes):
    texts = [f"{number}" * (number % 5) for number in range(300)]
    columns = {"a": texts, "b": texts[::-1]}
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(**columns))
    parts = [part for block in CorpusReader([tmp_path / "a.parquet"], ["b", "a"], block_bytes) for part in block.parts]
    rows = [row for part in parts for row in parquet.rows_of(part.data, ["b", "a"])]
    assert rows == [(b.encode(), a.encode()) for a, b in zip(texts, texts[::-1], strict=True)]
    assert [part.first for part in parts[:1]] == [0]


def test_one_text_in_many_rows_is_held_once(tmp_path):
    """100 GiB of text in 5 KB, of which reading holds a row at a time."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), [MEBIBYTE])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 17
    parts = (part for block in CorpusReader([tmp_path / "a.parquet"], ["text"]) for part in block.parts)
    for row in range(3):
        part = next(parts)
        assert (part.first, len(part.data) < 2 << 20) == (row, True)


def test_a_row_that_is_too_long(tmp_path):
    column = pyarrow.array(["x" * (1 << 27), "y"])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    printed, grown = peak_of(tmp_path / "a.parquet")
    assert "row group 0 has 128 MiB of 'text' in 2 rows, at most 33 can be read" in printed[0]
    assert grown < 100
    texts = ["z"] * 50 + [column[0].as_py()[: 1 << 25]]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    printed, grown = peak_of(tmp_path / "a.parquet")
    assert printed[0].endswith("a.parquet:row 50: over 16 MiB for one document: split it")


def test_what_unpacks_to_too_much_is_not_spooled(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(bytes(1 << 24)))
    with pytest.raises(UserError, match=r"a\.parquet\.gz: unpacks to over 100 times its size"):
        list(read_documents([tmp_path / "a.parquet.gz"]))


def test_a_footer_that_ends_the_process_is_refused(tmp_path, capfd):
    """A column that may be null, by its levels, and may not, by its schema: pyarrow aborts."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    whole, optional = path.read_bytes(), b"\x25\x02\x18\x04text"
    assert whole.count(optional) == 1
    path.write_bytes(whole.replace(optional, b"\x25\x00\x18\x04text"))
    with pytest.raises(UserError, match=r"a\.parquet: not a whole parquet file: its footer is damaged"):
        list(read_documents([path]))
    assert capfd.readouterr() == ("", "")
