"""Damaged corpora, tokenizers, token files and conversations: read, or refused in one line with nothing written."""

import gzip
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_preprocess import documents_of
from tests.data.test_tokenizer_kinds import byte_level
from tests.fuzz.mutations import damaged, emptied, fuzzed, outcome
from vishwamai_mp.data.chat import UnusableRecord, conversation
from vishwamai_mp.data.indexed import IndexedStats, IndexedWriter, check_indexed
from vishwamai_mp.data.prepare import PrepareReport, prepare
from vishwamai_mp.data.preprocess import PreprocessReport, preprocess
from vishwamai_mp.data.streams import zstd
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer

TEXTS = [f"{i} mice sat on mat {i * i}.\u2028 Ünï ☃\n\n" for i in range(40)]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS)).encode()
TALKS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x", "weight": i % 2}, ANSWER]}
    for i, text in enumerate(TEXTS[:8])
    for ANSWER in [{"role": "assistant", "content": "It is."}]
]


def parquet(compression: str, dictionary: bool) -> bytes:
    sink = io.BytesIO()
    table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, sink, compression=compression, use_dictionary=dictionary, row_group_size=16)
    return sink.getvalue()


CORPORA = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstd.compress(LINES),
    "a.txt": "".join(TEXTS).encode(),
    "snappy.parquet": parquet("snappy", True),
    "zstd.parquet": parquet("zstd", False),
    "a.parquet.gz": gzip.compress(parquet("none", True)),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, 370, tmp_path_factory.mktemp("tokenizer") / "small").path


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vishwamai_mp.data.indexed._to_disk", lambda file: file.flush())


def left_beside(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != name)


@pytest.mark.parametrize("name", CORPORA)
@fuzzed
@given(data=st.data())
def test_corpora(tmp_path: Path, tokenizer: Path, name: str, data: st.DataObject) -> None:
    folder = emptied(tmp_path / "corpus")
    (folder / name).write_bytes(data.draw(damaged(CORPORA[name])))
    on_error: Any = data.draw(st.sampled_from(("stop", "skip")))
    at: Any = "blank-lines" if name.endswith("txt") else None
    found = outcome(
        lambda: preprocess([folder / name], tokenizer, folder / "out", on_error=on_error, split_documents_at=at)
    )
    if isinstance(found, PreprocessReport):
        assert len(documents_of(folder / "out_text_document")) == found.documents
    else:
        assert name in found or "no text under" in found
        assert left_beside(folder, name) == []


@fuzzed
@given(data=st.data())
def test_conversations(tmp_path: Path, tokenizer: Path, data: st.DataObject) -> None:
    folder = emptied(tmp_path / "talks")
    whole = "".join(json.dumps(talk) + "\n" for talk in TALKS).encode()
    (folder / "a.jsonl").write_bytes(data.draw(damaged(whole)))
    on_error: Any = data.draw(st.sampled_from(("stop", "skip")))
    options: dict[str, Any] = {"sequence_length": 64, "on_error": on_error, "too_long": "skip"}
    found = outcome(lambda: prepare([folder / "a.jsonl"], tokenizer, folder / "out", **options))
    if isinstance(found, PrepareReport):
        assert len(documents_of(folder / "out_marks")) == len(documents_of(folder / "out")) == found.rows
    else:
        assert left_beside(folder, "a.jsonl") == []


KEYS = st.sampled_from(
    [
        *("messages", "conversations", "question", "answer", "prompt", "completion", "role", "content", "from"),
        *("value", "weight", "loss", "train", "tool_calls", ""),
    ]
)
WORDS = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "text", "\ud800", "\0", ""])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 2), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


@fuzzed
@given(record=VALUES, ignored=st.lists(KEYS, max_size=2))
def test_records(record: Any, ignored: list[str]) -> None:
    with suppress(UnusableRecord):
        assert conversation(record, ignored)[-1].learnt


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("described") / "tokenizer.json"
    byte_level().save(str(path))
    return path


@pytest.mark.parametrize("kind", ["tokenizer", "described"])
@fuzzed
@given(data=st.data())
def test_tokenizers(request: pytest.FixtureRequest, tmp_path: Path, kind: str, data: st.DataObject) -> None:
    path = tmp_path / "a.model"
    path.write_bytes(data.draw(damaged(request.getfixturevalue(kind).read_bytes())))
    found = outcome(lambda: Tokenizer(path))
    if isinstance(found, Tokenizer):
        outcome(lambda: found.decode(found.encode(TEXTS[3])))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("pair")
    lengths = np.array([7, 0, 300, 1])
    with IndexedWriter(folder / "whole", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(lengths.sum(), dtype=np.uint16).tobytes(), lengths)
        writer.publish()
    return {suffix: (folder / f"whole.{suffix}").read_bytes() for suffix in ("bin", "idx")}


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@fuzzed
@given(data=st.data())
def test_token_files(tmp_path: Path, pair: dict[str, bytes], suffix: str, data: st.DataObject) -> None:
    folder = emptied(tmp_path / "pair")
    for name, content in pair.items():
        (folder / f"a.{name}").write_bytes(data.draw(damaged(content)) if name == suffix else content)
    found = outcome(lambda: check_indexed(folder / "a", vocab_size=308))
    if isinstance(found, IndexedStats):
        documents = outcome(lambda: documents_of(folder / "a"))
        assert sum(map(len, documents)) == found.num_tokens
