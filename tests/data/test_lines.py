"""Lines end where "\\n" stands and nowhere else, and a torn last line of records is left out."""

import pytest

from vishwamai_mp.config import UserError
from vishwamai_mp.data.lines import json_records, text_lines

# What str.splitlines() or a file opened in Python's default way would split at.
WITHIN = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj"


def test_only_line_feeds_end_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(f"\ufeff{WITHIN}\n\r\n  \u3000\r\nlast".encode())
    assert list(text_lines(path)) == [WITHIN, "", "  \u3000", "last"]


@pytest.mark.parametrize("content", [b"", b"one\n", b"\n\n"])
def test_files_that_end_with_a_line_or_nothing(tmp_path, content):
    (tmp_path / "lines.txt").write_bytes(content)
    assert list(text_lines(tmp_path / "lines.txt")) == content.decode().split("\n")[:-1]


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(UnicodeDecodeError):
        list(text_lines(tmp_path / "lines.txt"))
    assert list(text_lines(tmp_path / "lines.txt", errors="replace")) == ["fine", "\ufffd"]


@pytest.mark.parametrize("torn", ["", '{"step": 3, "a', "{", "7\n", "nonsense\n", "\x00\x00"])
def test_a_torn_last_record_is_left_out(tmp_path, torn):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2, "of": "x\u2028y"}\n' + torn)
    assert list(json_records(tmp_path / "m.jsonl")) == [{"step": 1}, {"step": 2, "of": "x\u2028y"}]


def test_a_damaged_record_before_the_last_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2: no JSON object"):
        list(json_records(tmp_path / "m.jsonl"))
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl: No such file"):
        list(json_records(tmp_path / "none.jsonl"))
