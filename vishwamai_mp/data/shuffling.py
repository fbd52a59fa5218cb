"""The documents of a corpus in an order drawn from a seed, in little memory and with sequential access to the disk.

Each document gets a number of 64 bits that depends on the seed and on its place in the corpus alone; the order is that
of these numbers. Documents wait in buckets by the first bits of theirs; at the end one bucket after another is sorted
and handed on. So the order knows neither the workers nor the buckets.
"""

import contextlib
import mmap
import struct
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from vishwamai_mp.config.errors import UserError

_BUCKET_BYTES = 64 << 20  # of input, about
_MOST_BUCKETS = 128  # as many files are open at once
_FRAME = struct.Struct("<qq")  # documents and bytes of tokens that follow
_GIVEN_BYTES = 1 << 22  # of tokens handed on at once


class DocumentShuffler:
    """Takes documents in their order and gives them in another.

    Args:
        open_file: opens the file of a name, to append to and to read, where documents wait; these files hold the tokens
            of the corpus once more until the end. What they have is what was taken so far.
        itemsize: bytes of a token.
        seed: names the order.
        input_bytes: of the corpus, about; for the number of buckets.
        share: of the files that may be open, 1 over the number of shufflers at work.
        taken: documents, and bytes of tokens, that the files have.

    Raises:
        UserError: the disk is full or fails.
    """

    def __init__(
        self,
        open_file: Callable[[str], IO[bytes]],
        itemsize: int,
        seed: int,
        input_bytes: int,
        share: float = 1,
        taken: tuple[int, int] = (0, 0),
    ) -> None:
        self._open, self._itemsize, self._seed = open_file, itemsize, seed
        most = max(1, int(_MOST_BUCKETS * share))
        self._count = min(most, input_bytes // _BUCKET_BYTES + 1)
        self._files: list[IO[bytes]] = []
        self._documents, self.token_bytes = taken

    def __enter__(self) -> "DocumentShuffler":
        with self._failing():
            for number in range(self._count):
                self._files.append(self._open(f"bucket_{number}"))
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

    def add(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: their ids, concatenated.
            lengths: (documents,) tokens in each.
        """
        numbers = order_numbers(self._documents, len(lengths), self._seed)
        self._documents += len(lengths)
        self.token_bytes += len(tokens)
        buckets = ((numbers >> np.uint64(32)) * np.uint64(self._count) >> np.uint64(32)).astype(np.int64)
        ends = np.cumsum(lengths) * self._itemsize
        starts = ends - lengths * self._itemsize
        with self._failing():
            for bucket in np.unique(buckets):
                chosen = np.flatnonzero(buckets == bucket)
                content = b"".join(tokens[starts[at] : ends[at]] for at in chosen)
                file = self._files[bucket]
                file.write(_FRAME.pack(len(chosen), len(content)))
                file.write(numbers[chosen].tobytes())
                file.write(lengths[chosen].astype("<i8").tobytes())
                file.write(content)

    def shuffled(self) -> Iterator[tuple[bytes, np.ndarray]]:
        """All documents, some at a time, as `add` takes them."""
        for file in self._files:
            with self._failing():
                file.flush()
                size = file.tell()
            if not size:
                continue
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as bucket:
                yield from self._sorted(bucket)

    def _sorted(self, bucket: mmap.mmap) -> Iterator[tuple[bytes, np.ndarray]]:
        numbers, lengths, starts = [], [], []
        at = 0
        while at < len(bucket):
            count, size = _FRAME.unpack_from(bucket, at)
            at += _FRAME.size
            numbers.append(np.frombuffer(bucket[at : at + 8 * count], "<u8"))
            lengths.append(np.frombuffer(bucket[at + 8 * count : at + 16 * count], "<i8"))
            at += 16 * count
            starts.append(at + np.cumsum(lengths[-1] * self._itemsize) - lengths[-1] * self._itemsize)
            at += size
        order = np.argsort(np.concatenate(numbers), kind="stable")
        length_of, start_of = np.concatenate(lengths)[order], np.concatenate(starts)[order]
        first = held = 0
        for last, length in enumerate(length_of.tolist(), start=1):
            held += length * self._itemsize
            if held >= _GIVEN_BYTES or last == len(order):
                some = range(first, last)
                yield (
                    b"".join(bucket[start_of[i] : start_of[i] + length_of[i] * self._itemsize] for i in some),
                    length_of[first:last],
                )
                first, held = last, 0

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write what is to be shuffled: {error.strerror}") from error


def order_numbers(first: int, count: int, seed: int) -> np.ndarray:
    """The numbers (count,) that documents from `first` on are ordered by: SplitMix64 (doi 10.1145/2714064.2660195) of
    their places, begun at the seed's own. No two of a seed are equal, for it is one to one."""
    places = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    begun = _mixed(np.array([seed % (1 << 64)], dtype=np.uint64))
    return _mixed(begun + places * np.uint64(0x9E3779B97F4A7C15))


def _mixed(value: np.ndarray) -> np.ndarray:
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)
