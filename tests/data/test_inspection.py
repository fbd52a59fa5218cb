"""What tools/inspect_data.py says of a pair of token files."""

import numpy as np
import pytest

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.data.indexed import IndexedWriter
from vishwamai_mp.data.inspection import inspect_indexed, render_html, render_text
from vishwamai_mp.data.tokenizer import Tokenizer
from vishwamai_mp.data.tokenizer_training import train_tokenizer

LENGTHS = [3, 0, 1, 4, 8, 7]
HOSTILE = "<script>\x1b[31m & ünïcode 7"


def write(prefix, documents):
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        tokens = np.array([i for document in documents for i in document], dtype=np.uint16)
        writer.add(tokens.tobytes(), np.array([len(document) for document in documents], dtype=np.int64))
        writer.publish()


@pytest.fixture
def counted(tmp_path):
    """Documents of `LENGTHS` tokens, which count up over all of them."""
    ends = np.cumsum(LENGTHS)
    write(tmp_path / "counted", [list(range(end - n, end)) for end, n in zip(ends, LENGTHS, strict=True)])
    return tmp_path / "counted"


def test_documents_are_measured_and_cut_where_they_begin(counted):
    found = inspect_indexed(counted, first=1, count=4, max_tokens=5)
    assert found.lengths == {0: 0, 0.25: 1, 0.5: 3, 0.75: 4, 0.9: 7, 0.99: 7, 1: 8}
    assert found.histogram == [(0, 0, 1), (1, 1, 1), (2, 3, 1), (4, 7, 2), (8, 15, 1)]
    assert [(shown.number, shown.length) for shown in found.documents] == [(1, 0), (2, 1), (3, 4), (4, 8)]
    assert [shown.ids for shown in found.documents] == [[], [3], [4, 5, 6, 7], [8, 9, 10, 11, 12]]
    assert "document 4: 8 tokens, the first 5" in render_text(found)


def test_what_a_document_holds_is_shown_and_does_nothing(tmp_path):
    tokenizer = train_tokenizer([f"some words, {i}\n" for i in range(99)], 370, tmp_path / "small")
    write(tmp_path / "hostile", [tokenizer.encode(HOSTILE)])
    found = inspect_indexed(tmp_path / "hostile", Tokenizer(tokenizer.path))
    assert found.documents[0].text == HOSTILE
    text, page = render_text(found), render_html(found)
    assert repr(HOSTILE) in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "&lt;script&gt;" in page
    assert "<script" not in page


@pytest.mark.parametrize("first", [-1, len(LENGTHS)])
def test_a_document_that_is_not_there_is_refused(counted, first):
    with pytest.raises(UserError, match=f"--first {first}: .* has documents 0 to 5"):
        inspect_indexed(counted, first=first)


def test_another_tokenizers_tokens_are_refused(tmp_path):
    tokenizer = train_tokenizer([f"some words, {i}\n" for i in range(99)], 370, tmp_path / "small")
    write(tmp_path / "larger", [[1, 370]])
    with pytest.raises(UserError, match="token id 370 is outside the vocabulary"):
        inspect_indexed(tmp_path / "larger", tokenizer)
