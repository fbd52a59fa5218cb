"""Reading a corpus: every format and compression, and each bad document with its place and reason."""

import gzip
import io
import itertools
import json
import tracemalloc
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.data.corpus import CorpusReader, Malformed, kind_of, read_block, read_documents
from vishwamai_mp.data.streams import zstd

TEXTS = ["one\ntwo", "", "Ünï \u2028 ☃ 𐍈", '\\ " \t', "x" * 5000]


def compressed(path, content, suffix):
    """Write `content` under `path` + suffix, in two members or frames, as concatenated shards are."""
    half = len(content) // 2
    packers: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}
    pack = packers[suffix]
    target = path.with_name(path.name + suffix)
    target.write_bytes(pack(content[:half]) + pack(content[half:]))
    return target


def json_lines(texts, **dumps):
    return "".join(json.dumps({"id": 1, "text": text}, **dumps) + "\n" for text in texts).encode()


def parquet_bytes(**columns):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def bad(path, key="text"):
    return [str(document) for document in read_documents([path], key) if isinstance(document, Malformed)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_documents_of_every_format(tmp_path, name, suffix):
    content = parquet_bytes(text=TEXTS) if name.endswith("parquet") else json_lines(TEXTS)
    path = compressed(tmp_path / name, content, suffix)
    assert list(read_documents([path])) == TEXTS


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.py"])
def test_plain_text_is_one_document_a_file(tmp_path, name, suffix):
    first = compressed(tmp_path / name, b"\xef\xbb\xbfone\r\ntwo\n", suffix)
    second = compressed(tmp_path / f"b{name}", b"", suffix)
    assert list(read_documents([first, second, first])) == ["one\r\ntwo\n", "", "one\r\ntwo\n"]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), min_size=1, max_size=20
    ),
    block_bytes=st.integers(1, 200),
    ascii_only=st.booleans(),
    line_end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
    ends=st.booleans(),
)
def test_blocks_of_any_size_hold_the_same_documents(tmp_path_factory, texts, block_bytes, ascii_only, line_end, ends):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes((line_end.join(lines) + (line_end if ends else "")).encode())
    reader = CorpusReader([path], ["text"], block_bytes=block_bytes)
    documents = [document for block in reader for document in read_block(block, ["text"])]
    assert documents == [[text] for text in texts]
    assert reader.bytes_read == reader.total_bytes == path.stat().st_size


@settings(max_examples=30, deadline=None)
@given(lines=st.lists(st.binary(min_size=1, max_size=20).filter(lambda line: b"\n" not in line), max_size=10))
def test_any_bytes_are_a_document_or_a_reason(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("bytes") / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + b"\n".join(lines) + b'\n{"text": "last"}\n')
    documents = list(read_documents([path]))
    assert (documents[0], documents[-1]) == ("first", "last")
    assert all(isinstance(document, str | Malformed) for document in documents)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("block_bytes", [1, 5, 1 << 20])
def test_paragraphs_of_plain_text(tmp_path, suffix, block_bytes):
    content = "\ufeff\r\none\r\n two\u2028\x0c\r\n\r\n \t\n\x85\nthree\n\n  four".encode()
    path = compressed(tmp_path / "a.txt", content, suffix)
    reader = CorpusReader([path], ["text"], block_bytes, paragraphs=True)
    documents = [document for block in reader for document in read_block(block, ["text"])]
    assert documents == [["one\r\n two\u2028\x0c"], ["\x85\nthree"], ["  four"]]


@given(
    lines=st.lists(st.sampled_from(["", " ", "\t\r", "a", " b", "\x0b"]), max_size=12), block_bytes=st.integers(1, 20)
)
def test_paragraphs_are_runs_of_lines_that_are_not_blank(tmp_path_factory, lines, block_bytes):
    path = tmp_path_factory.mktemp("paragraphs") / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    reader = CorpusReader([path], ["text"], block_bytes, paragraphs=True)
    documents = [document for block in reader for document in read_block(block, ["text"])]
    runs = itertools.groupby(lines, key=lambda line: bool(line.strip(" \t\r")))
    assert documents == [["\n".join(run)] for filled, run in runs if filled]


def test_malformed_paragraphs_are_named_by_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\n\ntwo\nt\xffo\n\nth\0ree\n\nfour\n")
    for block_bytes in (1, 1 << 20):
        reader = CorpusReader([tmp_path / "a.txt"], ["text"], block_bytes, paragraphs=True)
        documents = [document for block in reader for document in read_block(block, ["text"])]
        assert [document for document in documents if not isinstance(document, Malformed)] == [["one"], ["four"]]
        assert [str(document).split(": ")[0] for document in documents[1:3]] == [
            f"{tmp_path}/a.txt:5",
            f"{tmp_path}/a.txt:7",
        ]
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match="--split-documents-at blank-lines is for plain text, of which --input names"):
        CorpusReader([tmp_path / "a.jsonl"], ["text"], paragraphs=True)


def test_files_keep_their_order_across_formats(tmp_path):
    names = ["a.jsonl", "b.txt", "c.py", "d.parquet", "e.jsonl"]
    for name in names:
        content = {"l": json_lines([name]), "t": parquet_bytes(text=[name])}.get(name[-1], name.encode())
        (tmp_path / name).write_bytes(parquet_bytes(text=[name]) if "parquet" in name else content)
    (tmp_path / "b.txt").write_bytes(b"b.txt")
    assert list(read_documents([tmp_path / name for name in names])) == names


def test_several_keys_come_together(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"q": "1", "a": "2"}\n{"q": "3"}\n')
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(a=["2", "5"], q=["1", None]))
    for name, reason in (("a.jsonl", "a.jsonl:2: no key 'a' (keys: 'q')"), ("a.parquet", "row 1: 'q' is null")):
        reader = CorpusReader([tmp_path / name], ["q", "a"])
        first, second = (document for block in reader for document in read_block(block, ["q", "a"]))
        assert first == ["1", "2"]
        assert reason in str(second)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON: Unterminated string starting at at column 10"),
        (b"plain words", "not JSON: Expecting value at column 1"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15"),
        (b"[", "not JSON: Expecting value at column 2; one JSON object per line is needed, not an array"),
        (b'["a"]', "a JSON array, not an object with ['text']"),
        (b'"a"', "a JSON string, not an object with ['text']"),
        (b"7", "a JSON number, not an object with ['text']"),
        (b"null", "a JSON null, not an object with ['text']"),
        (b'{"body": "a", "id": 1}', "no key 'text' (keys: 'body', 'id')"),
        (b'{"text": 5}', "'text' is number, not a string"),
        (b'{"text": null}', "'text' is null, not a string"),
        (b'{"text": ["a"]}', "'text' is array, not a string"),
        (b'{"text": "a\\u0000b"}', "'text' has a NUL character at 1"),
        (b'{"text": "a\0b"}', "not JSON: Invalid control character at at column 12"),
        (b'{"text": "a\\ud800"}', "'text' has a lone surrogate (\\ud800) at 1"),
        (b'{"text": "caf\xe9"}', "broken UTF-8: byte 0xe9 at 13"),
        (b'{"text": "a", "text": "b"}', "not usable JSON: the key 'text' stands twice in one object"),
        (b'{"text": "a", "m": [{"x": 1, "y": 2, "x": 3}]}', "not usable JSON: the key 'x' stands twice in one object"),
        (b'{"text": ' + b"[" * 100_000, "not usable JSON: nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not usable JSON: Exceeds the limit"),
    ],
)
def test_malformed_line_names_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    first, malformed, last = read_documents([path])
    assert (first, last) == ("good", "good")
    assert str(malformed).startswith(f"{path}:3: {reason}")
    assert "\n" not in str(malformed)


def test_line_numbers_count_across_blocks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 99 + b"bad\n")
    blocks = CorpusReader([path], ["text"], block_bytes=40)
    found = [d.where for block in blocks for d in read_block(block, ["text"]) if isinstance(d, Malformed)]
    assert found == [f"{path}:100"]


def test_paragraphs_between_carriage_returns_alone_are_named(tmp_path):
    """They would be one document."""
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\r\ntwo\rlines\n\nthree\r \rfour\r")
    (block,) = CorpusReader([tmp_path / "a.txt"], ["text"], paragraphs=True)
    first, second, third = read_block(block, ["text"])
    assert (first, second) == (["one"], ["two\rlines"])
    assert str(third).startswith(f"{tmp_path}/a.txt:5: carriage returns alone end its lines")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"fine\n\xff\xfea\0", ":2: broken UTF-8: byte 0xff at 5"),
        (b"fine\nfine\nx\0y", ":3: a NUL character: binary, or text in UTF-16"),
        ("fine\n".encode("utf-16"), ":1: text in UTF-16: convert it, with iconv -f utf-16 -t utf-8"),
        ("fine\n".encode("utf-32"), ":1: text in UTF-32: convert it, with iconv -f utf-32 -t utf-8"),
        (gzip.compress(b"fine"), ":1: gzip data: name it .gz"),
    ],
)
def test_malformed_text_file(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    assert bad(tmp_path / "a.txt") == [f"{tmp_path / 'a.txt'}{reason}"]


def test_empty_json_lines_file_is_malformed(tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert bad(tmp_path / "a.jsonl") == [f"{tmp_path / 'a.jsonl'}:1: the file is empty"]


def test_malformed_parquet_rows(tmp_path):
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"ok\xc3(")]
    )
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(text=broken))
    assert next(read_documents([tmp_path / "a.parquet"])) == "ok"
    assert bad(tmp_path / "a.parquet") == [f"{tmp_path / 'a.parquet'}:row 1: broken UTF-8: byte 0xc3 at 0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (parquet_bytes(body=["a"]), r"no column 'text' \(columns: body\)"),
        (parquet_bytes(text=[1]), r"column 'text' is int64, not text \(string, large_string, string_view, binary,"),
        (parquet_bytes(text=[["a"]]), "column 'text' is list<element: string>, not text"),
        (parquet_bytes(text=[{"a": "b"}]), "column 'text' is struct<a: string>, not text"),
        (
            parquet_bytes(text=pyarrow.array([b"ab"], pyarrow.binary(2))),
            r"column 'text' is fixed_size_binary\[2\], not",
        ),
        (parquet_bytes(text=pyarrow.array([Decimal(1)])), r"column 'text' is decimal128\(1, 0\), not text"),
        (b"PAR1 nonsense PAR1", "not a whole parquet file"),
        (parquet_bytes(text=TEXTS)[:-9], "not a whole parquet file"),
        (b"", "not a whole parquet file"),
    ],
)
def test_unusable_parquet_file(tmp_path, content, message):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.parquet: {message}") as caught:
        list(read_documents([tmp_path / "a.parquet"]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[:-6], lambda data: data[:30], lambda data: b"no archive at all"])
def test_damaged_compression(tmp_path, suffix, damage):
    path = compressed(tmp_path / "a.jsonl", json_lines(TEXTS * 50), suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"a\.jsonl{suffix}: damaged or cut short {suffix[1:]} data"):
        list(read_documents([path]))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"no input file .*none\.jsonl"):
        CorpusReader([tmp_path / "none.jsonl"], ["text"])
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(UserError, match="is a folder: name the files in it"):
        CorpusReader([tmp_path / "d.jsonl"], ["text"])
    with pytest.raises(UserError, match="is a folder: name the files in it"):
        CorpusReader([tmp_path], ["text"])
    with pytest.raises(UserError, match=r"a\.csv\.gz: unknown suffix; known are \.jsonl"):
        kind_of(tmp_path / "a.csv.gz")
    with pytest.raises(UserError, match=r"/dev/stdin has no suffix .* write it to a file that ends in \.jsonl"):
        kind_of(Path("/dev/stdin"))
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="plain text and has no keys"):
        CorpusReader([tmp_path / "a.txt"], ["q", "a"])


def test_too_long_documents_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vishwamai_mp.data.corpus.MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + json_lines(["y" * 300]))
    with pytest.raises(UserError, match=r"a\.jsonl:2: a line over"):
        list(CorpusReader([tmp_path / "a.jsonl"], ["text"], block_bytes=20))
    (tmp_path / "a.txt").write_bytes(b"x\n\n" + b"y\n" * 51)
    with pytest.raises(UserError, match=r"a\.txt:3: over .* without a blank line"):
        list(CorpusReader([tmp_path / "a.txt"], ["text"], block_bytes=2, paragraphs=True))
    (tmp_path / "a.txt").write_bytes(b"y" * 101)
    with pytest.raises(UserError, match=r"a\.txt: over .* for one document"):
        list(read_documents([tmp_path / "a.txt"]))


def test_reading_holds_one_block_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(["words " * 500]) * 8000, 1))  # 24 MB of text
    tracemalloc.start()
    try:
        size = sum(len(part.data) for block in CorpusReader([path], ["text"]) for part in block.parts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 24e6
    assert peak < 8e6


def test_a_parquet_column_whose_name_is_damaged(tmp_path):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "other": ["b"]}), sink, store_schema=False)
    path = tmp_path / "a.parquet"
    path.write_bytes(sink.getvalue().replace(b"other", b"oth\xffr"))
    with pytest.raises(UserError, match=r"a\.parquet: not a whole parquet file: 'utf-8' codec can't decode"):
        list(read_documents([path]))
