"""Reading a corpus of any size: files to blocks of about a megabyte, blocks to documents.

The two halves run apart. `CorpusReader` only cuts files into `Block`s, cheap enough for one process to feed many;
`read_block` parses one, which workers do side by side. Neither holds more than a block and the longest document.

Suffixes (each also with `.gz` or `.zst`): `.jsonl`, `.json` one JSON object per line; `.parquet` one row per
document, whose text is a string or binary column of any kind; `.txt`, `.md`, `.rst`, `.py` the whole file is one
document.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.data.parquet import require_pyarrow, row_blocks, rows_of
from vishwamai_mp.data.streams import COMPRESSED_SUFFIXES, open_stream

Kind = Literal["jsonl", "text", "paragraphs", "parquet"]

KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
}
BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 28  # a longer line or text file is a mistake, and would be held in memory whole
_MAX_MIB = MAX_DOCUMENT_BYTES >> 20
_LINE_SPACE = b" \t\r"  # of which a blank line consists; bytes.isspace() takes form feeds and others for space too
_BLANK_LINES = re.compile(rb"(?m)(?:^[ \t\r]*(?:\n|\Z))+")
_BLANK_MAC_LINES = re.compile(rb"\r[ \t]*\r(?!\n)")  # where lines end with carriage returns alone
_UTF8_MARK = b"\xef\xbb\xbf"
_BEGINNINGS = {  # of files that go by a wrong name
    b"\x1f\x8b": "gzip data: name it .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard data: name it .zst",
    b"BZh": "bzip2 data: unpack it",
    b"\xfd7zXZ": "xz data: unpack it",
    b"\xff\xfe\0\0": "text in UTF-32: convert it, with iconv -f utf-32 -t utf-8",
    b"\xff\xfe": "text in UTF-16: convert it, with iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "text in UTF-16: convert it, with iconv -f utf-16 -t utf-8",
}


class Part(NamedTuple):
    """Some bytes of one file: whole JSON lines, a whole text, whole paragraphs, or rows as an Arrow stream."""

    path: str
    first: int  # line (from 1) or row (from 0) at which the part begins
    data: bytes


class Position(NamedTuple):
    """Between two parts of a corpus. How parts are grouped into blocks changes nothing of the documents."""

    file: int  # of those given, from 0
    parts: int  # of it that are before this position


@dataclass(frozen=True)
class Block:
    """What a worker parses at a time. `end` is the position after it."""

    kind: Kind
    parts: tuple[Part, ...]
    end: Position


@dataclass(frozen=True)
class Malformed:
    """A document that cannot be used: `where` is `file:line` (`file:row N` for parquet)."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class CorpusReader:
    """Iterates the `Block`s of files, in the order given. Checks at once that every file exists and has a known suffix.

    Args:
        paths: the files.
        keys: of JSON objects or columns.
        block_bytes: of a block, about.
        paragraphs: a plain text file is a document for each stretch between blank lines, instead of one.

    Attributes:
        start: where to begin; files before it are not opened.
        total_bytes: size on disk of all files.
        bytes_read: of them, how many are behind us; for progress.
    """

    def __init__(
        self, paths: Sequence[str | Path], keys: Sequence[str], block_bytes: int = BLOCK_BYTES, paragraphs: bool = False
    ) -> None:
        self._sizes = [_size_of(Path(path)) for path in paths]
        self._files = [(Path(path), kind_of(Path(path))) for path in paths]
        if any(kind == "parquet" for _, kind in self._files):
            require_pyarrow()
        self._keys = list(keys)
        self._block_bytes = block_bytes
        self._finished_bytes = 0
        self._current: BinaryIO | None = None
        self.total_bytes = sum(self._sizes)
        self.start = Position(0, 0)
        text = next((path for path, kind in self._files if kind == "text"), None)
        if text and len(self._keys) > 1:
            raise UserError(f"{text} is plain text and has no keys: give one --json-keys name, not {len(self._keys)}")
        if paragraphs:
            if not text:
                raise UserError("--split-documents-at blank-lines is for plain text, of which --input names none")
            self._files = [(path, "paragraphs" if kind == "text" else kind) for path, kind in self._files]

    @property
    def bytes_read(self) -> int:
        current = self._current
        return self._finished_bytes + (current.tell() if current and current.seekable() else 0)

    def __iter__(self) -> Iterator[Block]:
        first = self.start.file
        self._finished_bytes = sum(self._sizes[:first])
        for kind, group in itertools.groupby(range(first, len(self._files)), key=lambda file: self._files[file][1]):
            parts = itertools.chain.from_iterable(map(self._placed_parts, group))
            yield from _grouped(kind, parts, self._block_bytes)

    def _placed_parts(self, file: int) -> Iterator[tuple[Position, Part]]:
        """The parts of a file that are not before the start, each with the position after it."""
        done = self.start.parts if file == self.start.file else 0
        for count, part in enumerate(self._parts(*self._files[file]), start=1):
            if count > done:
                yield Position(file, count), part

    def _parts(self, path: Path, kind: Kind) -> Iterator[Part]:
        with open_stream(path) as (stream, file):
            self._current = file
            try:
                if kind == "jsonl":
                    yield from _line_parts(path, stream, self._block_bytes)
                elif kind == "text":
                    yield _text_part(path, stream)
                elif kind == "paragraphs":
                    yield from _paragraph_parts(path, stream, self._block_bytes)
                else:
                    columns = list(dict.fromkeys(self._keys))
                    for row, data in row_blocks(path, stream, columns, self._block_bytes, MAX_DOCUMENT_BYTES):
                        yield Part(str(path), row, data)
            finally:
                self._current = None
        self._finished_bytes += path.stat().st_size


def kind_of(path: Path) -> Kind:
    """How `path` is read, by its suffix; `UserError` where the suffix is not known."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix
    if suffix not in KINDS:
        known = f"{' '.join(KINDS)}, each also with .gz or .zst"
        if path.parts[:2] in (("/", "dev"), ("/", "proc")):  # /dev/stdin, <(command)
            raise UserError(f"{path} has no suffix that says what it holds: write it to a file that ends in {known}")
        raise UserError(f"{path}: unknown suffix; known are {known}")
    return KINDS[suffix]


def read_block(block: Block, keys: Sequence[str]) -> Iterator[list[str] | Malformed]:
    """The documents of a block in order: the text under each of `keys`, or why there is none."""
    readers = {"jsonl": _read_lines, "text": _read_texts, "paragraphs": _read_paragraphs, "parquet": _read_rows}
    for part in block.parts:
        yield from readers[block.kind](part, keys)


def read_documents(paths: Sequence[str | Path], key: str = "text") -> Iterator[str | Malformed]:
    """Every document of a corpus in one stream, for uses that need no workers."""
    for block in CorpusReader(paths, [key]):
        for document in read_block(block, [key]):
            yield document if isinstance(document, Malformed) else document[0]


def _size_of(path: Path) -> int:
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the files in it, as {path}/*.jsonl")
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"no input file {path}: {error.strerror}") from None


def _grouped(kind: Kind, parts: Iterable[tuple[Position, Part]], block_bytes: int) -> Iterator[Block]:
    """Small files travel together: thousands of them would otherwise cost a message each."""
    group: list[Part] = []
    size = 0
    end = Position(0, 0)
    for end, part in parts:
        group.append(part)
        size += len(part.data)
        if size >= block_bytes or len(group) >= 1024:
            yield Block(kind, tuple(group), end)
            group, size = [], 0
    if group:
        yield Block(kind, tuple(group), end)


def _line_parts(path: Path, stream: BinaryIO, block_bytes: int) -> Iterator[Part]:
    line = 1
    data = stream.read(block_bytes)
    if not data:
        yield Part(str(path), line, b"")  # an empty file is a worker's to report, like any bad document
    while data:
        if not data.endswith(b"\n"):
            rest = stream.readline(MAX_DOCUMENT_BYTES)
            if len(rest) == MAX_DOCUMENT_BYTES:
                line += data.count(b"\n")
                raise UserError(f"{path}:{line}: a line over {_MAX_MIB} MiB: is it one JSON object per line?")
            data += rest
        if line == 1:
            data = data.removeprefix(_UTF8_MARK)
        yield Part(str(path), line, data)
        line += data.count(b"\n")
        data = stream.read(block_bytes)


def _text_part(path: Path, stream: BinaryIO) -> Part:
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise UserError(f"{path}: over {_MAX_MIB} MiB for one document: split it, or make it JSON lines")
    return Part(str(path), 1, data.removeprefix(_UTF8_MARK))


def _paragraph_parts(path: Path, stream: BinaryIO, block_bytes: int) -> Iterator[Part]:
    first = number = 1
    data = bytearray()
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        data += line.removeprefix(_UTF8_MARK) if number == 1 else line
        number += 1
        if len(data) >= block_bytes and not line.strip(_LINE_SPACE + b"\n"):
            yield Part(str(path), first, bytes(data))
            first, data = number, bytearray()
        elif len(data) > MAX_DOCUMENT_BYTES:
            raise UserError(f"{path}:{first}: over {_MAX_MIB} MiB without a blank line, for one document: split it")
    if data:
        yield Part(str(path), first, bytes(data))


def read_records(part: Part) -> Iterator[tuple[str, Any] | Malformed]:
    """The JSON values of some lines, each with its `file:line`; blank lines are none."""
    if not part.data:
        yield Malformed(f"{part.path}:{part.first}", "the file is empty")
    for number, line in enumerate(part.data.split(b"\n"), start=part.first):
        if not line.strip(_LINE_SPACE):
            continue
        where = f"{part.path}:{number}"
        try:
            record = parse_json(line.decode())
        except UnicodeDecodeError as error:
            yield Malformed(where, _not_utf8(error, number == 1))
        except JSONDecodeError as error:
            array = "; one JSON object per line is needed, not an array" if line.lstrip().startswith(b"[") else ""
            yield Malformed(where, f"not JSON: {error.msg} at column {error.colno}{array}")
        except ValueError as error:  # such as a number of thousands of digits, which Python refuses to read
            yield Malformed(where, f"not usable JSON: {error}")
        else:
            yield where, record


def _read_lines(part: Part, keys: Sequence[str]) -> Iterator[list[str] | Malformed]:
    for found in read_records(part):
        if isinstance(found, Malformed):
            yield found
            continue
        where, record = found
        try:
            texts = [record[key] for key in keys]
        except KeyError as error:
            yield Malformed(where, f"no key {error} (keys: {', '.join(map(repr, list(record)[:8]))})")
        except TypeError:
            yield Malformed(where, f"a JSON {_json_type(record)}, not an object with {list(keys)}")
        else:
            reason = next(filter(None, map(unusable, keys, texts)), None)
            yield Malformed(where, reason) if reason else texts


def _read_texts(part: Part, keys: Sequence[str]) -> Iterator[list[str] | Malformed]:
    try:
        text = part.data.decode()
    except UnicodeDecodeError as error:
        line = part.data.count(b"\n", 0, error.start) + part.first
        yield Malformed(f"{part.path}:{line}", _not_utf8(error, part.first == 1))
        return
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + part.first
        yield Malformed(f"{part.path}:{line}", "a NUL character: binary, or text in UTF-16")
    else:
        yield [text]


def _read_paragraphs(part: Part, keys: Sequence[str]) -> Iterator[list[str] | Malformed]:
    first, start = part.first, 0
    for blank in (*_BLANK_LINES.finditer(part.data), None):
        text = part.data[start : blank.start() if blank else None]
        if text and (found := _BLANK_MAC_LINES.search(text)):
            line = first + text.count(b"\n", 0, found.start())
            problem = "carriage returns alone end its lines, blank ones too: convert them, with tr '\\r' '\\n'"
            yield Malformed(f"{part.path}:{line}", problem)
        elif text:
            yield from _read_texts(Part(part.path, first, text.removesuffix(b"\n").removesuffix(b"\r")), keys)
        if blank:
            first += part.data.count(b"\n", start, blank.end())
            start = blank.end()


def _read_rows(part: Part, keys: Sequence[str]) -> Iterator[list[str] | Malformed]:
    for row, values in enumerate(rows_of(part.data, keys), start=part.first):
        try:
            texts = [value if value is None else value.decode() for value in values]
        except UnicodeDecodeError as error:
            yield Malformed(f"{part.path}:row {row}", _not_utf8(error, begins_file=False))
            continue
        reason = next(filter(None, map(unusable, keys, texts)), None)
        yield Malformed(f"{part.path}:row {row}", reason) if reason else cast(list[str], texts)


def unusable(key: str, text: object) -> str | None:
    """Why the value under `key` cannot be a document, or None where it can."""
    if not isinstance(text, str):
        return f"{key!r} is {_json_type(text)}, not a string"
    if "\0" in text:
        return f"{key!r} has a NUL character at {text.index(chr(0))}"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"{key!r} has a lone surrogate (\\u{ord(text[error.start]):04x}) at {error.start}"
    return None


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _not_utf8(error: UnicodeDecodeError, begins_file: bool) -> str:
    for beginning, what in _BEGINNINGS.items():
        if begins_file and error.object.startswith(beginning):
            return what
    return f"broken UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}"
