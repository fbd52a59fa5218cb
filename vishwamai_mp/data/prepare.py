"""Conversations to rows for fine-tuning: whole conversations side by side, with a mark on every token.

A row is one document of `<prefix>.bin/.idx`: `sequence_length` + 1 tokens, of which the last is only a label. Beside
it `<prefix>_marks.bin/.idx` has a byte for each token (see `marks`). What conversations leave of a row is filled with
padding, a document of its own without loss. `<prefix>_rows.json` says how the rows were made.
"""

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.data.bins import best_fit
from vishwamai_mp.data.chat import ChatEncoder, Encoded, UnusableRecord
from vishwamai_mp.data.chat_template import ChatTemplate, read_template, template_beside
from vishwamai_mp.data.corpus import Block, CorpusReader, Malformed, kind_of, read_records
from vishwamai_mp.data.indexed import IndexedWriter, token_dtype
from vishwamai_mp.data.marks import BEGINS, LEARNT, SUFFIX
from vishwamai_mp.data.preprocess import OnError, encoded_blocks
from vishwamai_mp.data.templated_chat import TemplatedChat
from vishwamai_mp.data.tokenizer import Tokenizer

TooLong = Literal["stop", "truncate", "skip"]
_ROWS_AT_ONCE = 256


@dataclass
class PrepareReport:
    """What became of conversations. `rows`, their `prefix` and what is in them are known at the end."""

    conversations: int = 0
    truncated: int = 0
    too_long: int = 0  # left out
    malformed: int = 0  # left out
    tokens: int = 0  # of conversations
    learnt_tokens: int = 0
    rows: int = 0
    row_tokens: int = 0  # of one
    prefix: str = ""
    template: ChatTemplate | None = None  # None: the one in `chat.py`
    bytes_read: int = 0
    total_bytes: int = 0
    seconds: float = 0.0

    @property
    def filled(self) -> float:
        """The share of all rows that is no padding."""
        return self.tokens / max(1, self.rows * self.row_tokens)


@dataclass(frozen=True)
class EncodedConversations:
    """A worker's answer: tokens and marks of conversations end to end, their (conversations,) lengths, and the rest."""

    tokens: bytes
    marks: bytes
    lengths: np.ndarray
    truncated: int
    too_long: list[Malformed]
    malformed: list[Malformed]


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output_prefix: str | Path,
    *,
    sequence_length: int,
    packing: bool = True,
    begin: bool = False,
    chat_template: Path | Literal["own", "none"] = "own",
    too_long: TooLong = "stop",
    on_error: OnError = "stop",
    ignored_keys: Collection[str] = (),
    workers: int = 1,
    on_progress: Callable[[PrepareReport], None] | None = None,
    on_skip: Callable[[Malformed], None] | None = None,
) -> PrepareReport:
    """Write the rows of JSON lines with a conversation each. The two pairs appear together at the end, or not at all.

    Memory holds the conversations' lengths; their tokens wait in files without a name beside the output.

    Args:
        inputs: `.jsonl` or `.json`, also with `.gz` or `.zst`; records as in `chat.conversation`.
        tokenizer: with an end-of-document token; a file or folder as `Tokenizer` has it.
        sequence_length: `training.sequence_length` of the training to come.
        packing: False: one conversation a row.
        begin: conversations begin with the tokenizer's beginning-of-sequence token; for the template in `chat.py`.
        chat_template: a file with a template; "own": the one beside the tokenizer if there is one; "none": the one
            that `chat.py` describes.
        too_long: what becomes of a conversation longer than a row: an error, its beginning alone (it is left out where
            that has nothing to learn), or nothing.
        on_error: "stop" at the first malformed record, or "skip" and count it.
        ignored_keys: of records and messages, taken as not there.
        workers: processes that encode; 1 encodes in this one.
        on_progress: called after each block with the report so far.
        on_skip: called with each record left out.

    Raises:
        UserError: files that are missing or damaged, a malformed or too long record under "stop", nothing to learn, a
            full disk.
    """
    for path in inputs:
        if kind_of(Path(path)) != "jsonl":
            raise UserError(f"{path}: conversations are read from .jsonl or .json, also with .gz or .zst")
    if sequence_length < 1 or workers < 1:
        raise UserError(f"--sequence-length {sequence_length}, --workers {workers}: at least 1 each")
    reader = CorpusReader(inputs, [])
    vocabulary = Tokenizer(tokenizer)
    template = _template_for(vocabulary, chat_template)
    if template and begin:
        raise UserError(
            f"--bos: the chat template of {template.name} says what a conversation begins with; leave it out"
        )
    now = datetime.now()
    ignored = frozenset(ignored_keys)
    make_chat = partial(_chat_encoder, str(tokenizer), begin, template, ignored, now)
    make_chat()  # finds what the tokenizer lacks
    report = PrepareReport(
        total_bytes=reader.total_bytes, row_tokens=sequence_length + 1, prefix=str(output_prefix), template=template
    )
    started = time.perf_counter()
    make = partial(ConversationEncoder, make_chat, report.row_tokens, too_long, on_error == "stop")
    dtype = token_dtype(vocabulary.vocab_size)
    with contextlib.ExitStack() as stack:
        rows = stack.enter_context(IndexedWriter(output_prefix, dtype))
        marks = stack.enter_context(IndexedWriter(f"{output_prefix}{SUFFIX}", np.dtype(np.uint8)))
        spool = stack.enter_context(_Spool(Path(output_prefix).absolute().parent, dtype))
        for block in stack.enter_context(encoded_blocks(reader, workers, make)):
            _stop_at(block, too_long, on_error)
            if on_skip:
                for left_out in (*block.malformed, *block.too_long):
                    on_skip(left_out)
            spool.add(block)
            report.conversations += len(block.lengths)
            report.tokens += int(block.lengths.sum())
            report.truncated += block.truncated
            report.too_long += len(block.too_long)
            report.malformed += len(block.malformed)
            report.bytes_read, report.seconds = reader.bytes_read, time.perf_counter() - started
            if on_progress:
                on_progress(report)
        if not report.conversations:
            raise UserError(
                f"no conversation to learn from in the input ({report.malformed} malformed and {report.too_long} too"
                " long left out); nothing was written"
            )
        lengths = spool.lengths()
        layout = best_fit(lengths, report.row_tokens) if packing else [[number] for number in range(len(lengths))]
        padding = vocabulary.pad_id if vocabulary.pad_id >= 0 else vocabulary.require_eod()
        for tokens, marked in spool.rows(layout, report.row_tokens, padding):
            sizes = np.full(len(tokens), report.row_tokens)
            rows.add(tokens.tobytes(), sizes)
            marks.add(marked.tobytes(), sizes)
            report.learnt_tokens += int(np.count_nonzero(marked & LEARNT))
        report.rows = len(layout)
        for writer in (rows, marks):
            writer.finish()
        marks.publish()
        _describe(report, vocabulary, packing, begin, now)
        rows.publish()
    report.seconds = time.perf_counter() - started
    return report


def _stop_at(block: EncodedConversations, too_long: TooLong, on_error: OnError) -> None:
    if block.malformed and on_error == "stop":
        raise UserError(f"{block.malformed[0]} (--on-error skip leaves such records out)")
    if block.too_long and too_long == "stop":
        raise UserError(f"{block.too_long[0]}; raise --sequence-length, or --too-long truncate or skip")


def _template_for(tokenizer: Tokenizer, asked: Path | Literal["own", "none"]) -> ChatTemplate | None:
    if isinstance(asked, Path):
        return read_template(asked)
    return template_beside(tokenizer.path) if asked == "own" else None


def _describe(report: PrepareReport, tokenizer: Tokenizer, packing: bool, begin: bool, now: datetime) -> None:
    """Say beside the rows how they were made; the same for the same rows."""
    template = report.template
    chat: dict[str, Any] = {"name": "the headings of vishwamai_mp/data/chat.py", "bos": begin}
    if template:
        chat = {"name": template.name, "sha256": template.sha256, "answers": template.answers_by}
        if template.tells_time:
            chat["date"] = now.date().isoformat()
    counts = ("conversations", "truncated", "too_long", "malformed", "tokens", "learnt_tokens", "rows")
    description = {
        "tokenizer": {"name": tokenizer.path.name, "sha256": hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()},
        "chat_template": chat,
        "sequence_length": report.row_tokens - 1,
        "packing": packing,
        **{name: getattr(report, name) for name in counts},
    }
    path = Path(f"{report.prefix}_rows.json")
    try:
        write_whole(path, json.dumps(description, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; nothing was kept") from error


class _Chat(Protocol):
    """Records to tokens and marks, or why there are none."""

    def encode_records(self, records: Sequence[Any]) -> Iterator[Encoded | UnusableRecord]: ...


def _chat_encoder(
    tokenizer: str, begin: bool, template: ChatTemplate | None, ignored: Collection[str], now: datetime
) -> tuple[Tokenizer, _Chat]:
    vocabulary = Tokenizer(tokenizer)
    if template:
        return vocabulary, TemplatedChat(vocabulary, template, ignored, now)
    return vocabulary, ChatEncoder(vocabulary, begin, ignored)


class ConversationEncoder:
    """Parses and encodes blocks of JSON lines; one per worker."""

    def __init__(
        self,
        make_chat: Callable[[], tuple[Tokenizer, _Chat]],
        row_tokens: int,
        too_long: TooLong,
        stop_at_malformed: bool,
    ) -> None:
        vocabulary, self._chat = make_chat()
        self._dtype = token_dtype(vocabulary.vocab_size)
        self._row_tokens, self._too_long, self._stop_at_malformed = row_tokens, too_long, stop_at_malformed

    def encode(self, block: Block) -> EncodedConversations:
        tokens: list[int] = []
        marks: list[int] = []
        lengths: list[int] = []
        truncated = 0
        too_long: list[Malformed] = []
        malformed: list[Malformed] = []
        records = [record for part in block.parts for record in read_records(part)]
        encoded = self._chat.encode_records([found[1] for found in records if not isinstance(found, Malformed)])
        for found in records:
            if isinstance(found, Malformed):
                malformed.append(found)
                continue
            where, _ = found
            made = next(encoded)
            if isinstance(made, UnusableRecord):
                malformed.append(Malformed(where, str(made)))
                if self._stop_at_malformed:
                    break
                continue
            ids, marked = made
            if len(ids) > self._row_tokens:
                begins = marked[: self._row_tokens]
                if self._too_long != "truncate" or not any(mark & LEARNT for mark in begins[1:]):
                    too_long.append(Malformed(where, f"{len(ids)} tokens, and a row has {self._row_tokens}"))
                    continue
                ids, marked, truncated = ids[: self._row_tokens], begins, truncated + 1
            tokens += ids
            marks += marked
            lengths.append(len(ids))
        return EncodedConversations(
            np.array(tokens, dtype=self._dtype).tobytes(),
            bytes(marks),
            np.array(lengths, dtype=np.int64),
            truncated,
            too_long,
            malformed,
        )


@dataclass
class _Spool:
    """Encoded conversations on disk until it is known which row each belongs to."""

    folder: Path
    dtype: np.dtype
    _files: list[BinaryIO] = field(default_factory=list)
    _lengths: list[np.ndarray] = field(default_factory=list)

    def __enter__(self) -> "_Spool":
        with self._failing():
            for _ in range(2):
                self._files.append(tempfile.TemporaryFile(dir=self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

    def add(self, block: EncodedConversations) -> None:
        with self._failing():
            for file, content in zip(self._files, (block.tokens, block.marks), strict=True):
                file.write(content)
        self._lengths.append(block.lengths)

    def lengths(self) -> np.ndarray:
        return np.concatenate(self._lengths)

    def rows(
        self, layout: Sequence[Sequence[int]], row_tokens: int, padding: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and marks (rows, row_tokens) of some rows at a time.

        Args:
            layout: the conversations of each row.
            padding: the token that fills a row up.
        """
        with self._failing():
            for file in self._files:
                file.flush()
        ends = np.cumsum(self.lengths())
        tokens, marks = (
            np.memmap(file, dtype=dtype, mode="r")
            for file, dtype in zip(self._files, (self.dtype, np.dtype(np.uint8)), strict=True)
        )
        for first in range(0, len(layout), _ROWS_AT_ONCE):
            chunk = layout[first : first + _ROWS_AT_ONCE]
            of_tokens = np.full((len(chunk), row_tokens), padding, dtype=self.dtype)
            of_marks = np.zeros((len(chunk), row_tokens), dtype=np.uint8)
            for row, numbers in enumerate(chunk):
                at = 0
                for number in numbers:
                    start, end = (int(ends[number - 1]) if number else 0), int(ends[number])
                    of_tokens[row, at : at + end - start] = tokens[start:end]
                    of_marks[row, at : at + end - start] = marks[start:end]
                    at += end - start
                if at < row_tokens:
                    of_marks[row, at] = BEGINS
            yield of_tokens, of_marks

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; nothing was kept") from error
