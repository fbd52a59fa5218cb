"""Indexed token files: the `.bin/.idx` pair that megatron-core's `IndexedDataset` reads.

`.bin` is every document's token ids, one after the other. `.idx`, little-endian throughout, is

    magic "MMIDIDX\\0\\0" | version 1 (u64) | dtype code (u8) | sequences N (u64) | document boundaries D+1 (u64)
    | tokens of each sequence (N * i32) | byte offset of each sequence (N * i64)
    | first sequence of each document, and N at the end ((D+1) * i64)

Here a document is one sequence, or none where it has no token. Training reads through megatron-core; this file writes
pairs and checks them.
"""

import contextlib
import glob
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO

import numpy as np

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.files import aside_of, sync_folder
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CHUNK = 1 << 18  # elements of an index handled at a time


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype megatron-core expects of a vocabulary: two bytes a token below 65,500, else four."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Writes one pair aside and publishes it under `prefix` when told; memory does not grow with the corpus.

    with IndexedWriter(prefix, dtype) as writer:
        writer.add(tokens, lengths)
        writer.publish()

    Leaving the block without `publish` leaves nothing behind, and an older pair as it was. Raises `UserError` where
    the disk is full or the folder cannot be written.

    Args:
        prefix: the pair's path without suffix.
        dtype: of tokens.
        open_file: opens the file of a name, to append to and to read, on the file system of `prefix`: documents are
            added to those that the files have, and the files stay when the block is left. None: files of its own.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: np.dtype,
        open_file: Callable[[str], IO[bytes]] | None = None,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        self.num_tokens = self.num_documents = self.num_sequences = 0
        self._code = next(code for code, known in _DTYPES.items() if known == self.dtype)
        self._bin, self._idx = (aside_of(Path(f"{self.prefix}.{suffix}")) for suffix in ("bin", "idx"))
        self._open = open_file
        self._files: list[IO[bytes]] = []
        self._published = False

    def __enter__(self) -> "IndexedWriter":
        folder = Path(self.prefix).absolute().parent
        if not folder.is_dir():
            raise UserError(f"cannot write {self.prefix}.bin: there is no folder {folder}")
        self._tokens: IO[bytes]
        self._lengths: IO[bytes]  # which wait on disk until their number is known
        try:
            if self._open:
                self._tokens, self._lengths = self._open("tokens"), self._open("lengths")
                self._bin = Path(self._tokens.name)
                self._count()
            else:
                self._tokens = self._bin.open("wb")
                self._files.append(self._tokens)
                self._lengths = tempfile.TemporaryFile(dir=folder)  # without a name
                self._files.append(self._lengths)
        except OSError as error:
            self._discard()
            raise self._failure(error) from error
        return self

    def _count(self) -> None:
        """What the files have already."""
        for lengths in self._stored_lengths():
            self.num_documents += len(lengths)
            self.num_sequences += int(np.count_nonzero(lengths))
            self.num_tokens += int(lengths.sum(dtype=np.int64))

    def add(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: their ids, concatenated, as bytes of `dtype`.
            lengths: (documents,) tokens in each; 0 for a document without any.
        """
        assert len(tokens) == int(lengths.sum()) * self.dtype.itemsize, "lengths do not add up to the tokens"
        try:
            self._tokens.write(tokens)
            self._lengths.write(lengths.astype("<i4").tobytes())
        except OSError as error:
            raise self._failure(error) from error
        self.num_tokens += len(tokens) // self.dtype.itemsize
        self.num_documents += len(lengths)
        self.num_sequences += int(np.count_nonzero(lengths))

    def finish(self) -> None:
        """Complete both files, still aside, so that several pairs can be completed before any is published."""
        try:
            with self._idx.open("wb") as idx:
                self._write_index(idx)
                _to_disk(idx)
            _to_disk(self._tokens)
            self._tokens.close()
        except OSError as error:
            raise self._failure(error) from error

    def publish(self) -> None:
        """Put the pair in place of any older one. The index comes last: without it there is no pair."""
        if not self._tokens.closed:
            self.finish()
        try:
            Path(f"{self.prefix}.idx").unlink(missing_ok=True)
            self._bin.replace(f"{self.prefix}.bin")
            self._idx.replace(f"{self.prefix}.idx")
            sync_folder(Path(self.prefix).absolute().parent)
        except OSError as error:
            raise self._failure(error) from error
        self._published = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _write_index(self, idx: BinaryIO) -> None:
        idx.write(_HEADER.pack(_MAGIC, _VERSION, self._code, self.num_sequences, self.num_documents + 1))
        for lengths in self._stored_lengths():
            idx.write(lengths[lengths > 0].tobytes())
        offset = 0
        for lengths in self._stored_lengths():
            ends = offset + np.cumsum(lengths[lengths > 0], dtype="<i8") * self.dtype.itemsize
            if ends.size:
                idx.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
                offset = int(ends[-1])
        boundary = 0
        idx.write(struct.pack("<q", boundary))
        for lengths in self._stored_lengths():
            boundaries = boundary + np.cumsum(lengths > 0, dtype="<i8")
            idx.write(boundaries.tobytes())
            boundary = int(boundaries[-1])

    def _stored_lengths(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while data := self._lengths.read(4 * _CHUNK):
            yield np.frombuffer(data, dtype="<i4")

    def _failure(self, error: OSError) -> UserError:
        kept = "" if self._open else "; nothing was kept of it"
        return UserError(f"cannot write {self.prefix}.bin/.idx: {error.strerror}{kept}")

    def _discard(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):  # what is buffered no longer fits, and is not wanted
                file.close()
        if not self._published:
            if not self._open:
                self._bin.unlink(missing_ok=True)
            self._idx.unlink(missing_ok=True)


@dataclass(frozen=True)
class IndexedStats:
    """What a checked pair holds. `max_token` is -1 unless the tokens themselves were read."""

    prefix: str
    dtype: np.dtype
    num_documents: int
    num_sequences: int
    num_tokens: int
    max_token: int = -1


def check_indexed(prefix: str | os.PathLike[str], vocab_size: int | None = None) -> IndexedStats:
    """Check that `<prefix>.bin/.idx` is a whole pair that megatron-core can read, in flat memory.

    Args:
        prefix: the path without suffix.
        vocab_size: if given, every token is read and must be below it.

    Raises `UserError`, one line, where a file is missing, empty, cut short or corrupt, where the two do not belong
    together, or where a token is outside the vocabulary.
    """
    prefix = os.fspath(prefix)
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise UserError(f"no data file {path}: {_mend(prefix)}")
        if path.stat().st_size == 0:
            raise UserError(f"data file {path} is empty: preprocess it again")
        refuse_pointer_or_pipe(path)
    dtype, sequences, boundaries = _check_header(idx_path)
    index = np.memmap(idx_path, mode="r")
    try:
        num_tokens = _check_sequences(idx_path, index, sequences, dtype.itemsize)
        _check_boundaries(idx_path, index[_HEADER.size + 12 * sequences :].view("<i8"), sequences)
    finally:
        index._mmap.close()  # type: ignore[attr-defined]
    size, promised = bin_path.stat().st_size, num_tokens * dtype.itemsize
    if size != promised:
        raise UserError(f"{bin_path} has {size} bytes but its index promises {promised}: cut short, or of another pair")
    max_token = -1 if vocab_size is None else _check_tokens(bin_path, dtype, vocab_size)
    return IndexedStats(prefix, dtype, boundaries - 1, sequences, num_tokens, max_token)


def document_spans(prefix: str | os.PathLike[str]) -> np.ndarray:
    """Where each document of a pair begins in its `.bin`, in tokens, and at the end where the last one ends: [D + 1].

    Raises `UserError` as `check_indexed` does for an index that is damaged.
    """
    path = Path(f"{os.fspath(prefix)}.idx")
    _, sequences, _ = _check_header(path)
    index = np.fromfile(path, dtype=np.uint8, offset=_HEADER.size)
    ends = np.cumsum(index[: 4 * sequences].view("<i4"), dtype=np.int64)
    boundaries = index[12 * sequences :].view("<i8")
    return np.concatenate(([0], ends))[boundaries]


def _check_header(path: Path) -> tuple[np.dtype, int, int]:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise UserError(f"{path} is not an index file: it does not start with {_MAGIC[:7].decode()}")
    if len(header) < _HEADER.size:
        raise UserError(f"{path} is cut short: {len(header)} bytes, of which the header alone is {_HEADER.size}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != _VERSION:
        raise UserError(f"{path} is an index of version {version}; only version {_VERSION} can be read")
    if code not in _DTYPES:
        raise UserError(f"{path} is corrupt: dtype code {code}, known are {min(_DTYPES)} to {max(_DTYPES)}")
    size, promised = path.stat().st_size, _HEADER.size + 12 * sequences + 8 * boundaries
    if sequences and size == promised + sequences:
        raise UserError(
            f"{path} is of the multimodal layout, with a mode for each sequence, which is not read here: preprocess"
            " the text alone"
        )
    if size != promised:
        raise UserError(f"{path} has {size} bytes but its header promises {promised}: cut short or corrupt")
    if sequences == 0:
        raise UserError(f"{path} indexes no tokens: preprocess a corpus that has text")
    return np.dtype(_DTYPES[code]), sequences, boundaries


def _check_sequences(path: Path, index: np.ndarray, count: int, itemsize: int) -> int:
    """Check the lengths against the byte offsets; returns the number of tokens."""
    lengths = index[_HEADER.size :][: 4 * count].view("<i4")
    offsets = index[_HEADER.size + 4 * count :][: 8 * count].view("<i8")
    tokens = 0
    for at in range(0, count, _CHUNK):
        length = lengths[at : at + _CHUNK].astype(np.int64)
        starts = tokens + np.cumsum(length) - length
        wrong = np.flatnonzero((length < 0) | (offsets[at : at + _CHUNK] != starts * itemsize))
        if wrong.size:
            raise UserError(f"{path} is corrupt: length and offset of sequence {at + int(wrong[0])} disagree")
        tokens += int(length.sum())
    return tokens


def _mend(prefix: str) -> str:
    """What to give instead of a prefix without a pair: the name of one of its files, and the prefix that preprocessing
    was given, are easily taken for it."""
    found = [index.removesuffix(".idx") for index in sorted(glob.glob(f"{glob.escape(prefix)}_*_document.idx"))]
    for other in [prefix.removesuffix(".bin").removesuffix(".idx"), *found]:
        if os.path.isfile(f"{other}.bin") and os.path.isfile(f"{other}.idx"):
            return f"did you mean {other}?"
    return "give the prefix that tools/preprocess_data.py printed"


def _check_boundaries(path: Path, boundaries: np.ndarray, sequences: int) -> None:
    if boundaries.size == 0 or boundaries[0] != 0 or boundaries[-1] != sequences:
        raise UserError(f"{path} is corrupt: its documents do not span its {sequences} sequences")
    for at in range(0, boundaries.size, _CHUNK):
        if np.any(np.diff(boundaries[at : at + _CHUNK + 1]) < 0):
            raise UserError(f"{path} is corrupt: its document boundaries are out of order")


def _check_tokens(path: Path, dtype: np.dtype, vocab_size: int) -> int:
    tokens = np.memmap(path, dtype=dtype, mode="r")
    low = high = 0
    for at in range(0, tokens.size, 16 * _CHUNK):
        chunk = tokens[at : at + 16 * _CHUNK]
        low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise UserError(f"{path} holds token {wrong}, but the vocabulary has {vocab_size}: is it another tokenizer's?")
    return high


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
