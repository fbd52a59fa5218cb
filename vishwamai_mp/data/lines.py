"""The lines of a text file, and the JSON objects of a file with one on each line.

A line ends with "\\n" or "\\r\\n". `str.splitlines()` and files opened in Python's default way also end lines at "\\r",
the former at "\\v", "\\f", U+0085, U+2028 and others too, which stand within texts and JSON strings.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe


def text_lines(path: Path, errors: str = "strict") -> Iterator[str]:
    """The lines of a UTF-8 file, without their ends; a byte order mark is no part of the first.

    Args:
        errors: what becomes of bytes that are not UTF-8, as in `open`.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8, under "strict".
        UserError: it is a pointer of git-lfs, or a named pipe.
    """
    refuse_pointer_or_pipe(path)
    with path.open(encoding="utf-8-sig", errors=errors, newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n").removesuffix("\r")


def json_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that a program appends to, one on each line. A torn last line, of a program that was
    killed or is writing, is left out.

    Raises:
        UserError: the file cannot be read, or another line is no object.
    """
    wrong = ""
    try:
        for number, line in enumerate(text_lines(path, errors="replace"), start=1):
            if wrong:
                raise UserError(wrong)
            record = _object(line)
            if record is None:
                wrong = f"{path}:{number}: no JSON object; mend or remove the line"
            else:
                yield record
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _object(line: str) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
