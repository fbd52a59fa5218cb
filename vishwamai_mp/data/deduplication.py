"""Which documents of a corpus are repeated: the first in the corpus's order stays, later ones are dropped.

`exact`: documents of the same text, by a 128-bit hash of it; about 100 bytes of memory for each that stays.

`minhash`: documents that are nearly the same. A document is the set of its runs of five tokens, which needs no notion
of words and so serves every language and code; two are repeated where the Jaccard similarity of these sets, estimated
from 128 minimal hashes, is at least 0.8. Candidates are found by locality-sensitive hashing in 16 bands, which misses 1
of 20 pairs at a similarity of 0.8 and 1 of 8,000 at 0.9; about 2.5 KB of memory for each document that stays.

MinHash is `rensa`'s, which is written in Rust: 44 MB of text a second for a signature, where `datasketch`, in Python on
numpy, has 1.1 (both on one core of the same machine, 2,000 documents of 400 words).
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import IO, Any, Literal, Protocol

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.wording import lacks

Dedup = Literal["exact", "minhash"]
_HASH_BYTES = 16
_FRAME = struct.Struct("<I")  # bytes of the print that follows
_RUN = 5  # tokens
_SIMILAR, _HASHES, _BANDS, _SEED = 0.8, 128, 16, 1


class Prints(Protocol):
    """What a worker makes of a document for `Seen` to compare."""

    def of(self, texts: Sequence[str], tokens: Sequence[bytes]) -> bytes: ...


class Seen(Protocol):
    """The documents so far."""

    def is_new(self, found: bytes) -> bool:
        """Whether none of them is like this one, which is remembered if so."""


class KeptPrints:
    """`Seen`, which writes the prints of what is new to a file, and begins with those that are there.

    Args:
        kind: of comparison.
        file: at its end, open for reading too.

    Raises:
        UserError: the package that compares is missing.
    """

    def __init__(self, kind: Dedup, file: IO[bytes]) -> None:
        self._seen, self._file = seen(kind), file
        file.seek(0)
        while frame := file.read(_FRAME.size):
            self._seen.is_new(file.read(*_FRAME.unpack(frame)))

    def is_new(self, found: bytes) -> bool:
        new = self._seen.is_new(found)
        if new:
            self._file.write(_FRAME.pack(len(found)) + found)
        return new


def prints(kind: Dedup, itemsize: int) -> Prints:
    """For a worker.

    Args:
        kind: of comparison.
        itemsize: bytes of a token.
    """
    return _TextHash() if kind == "exact" else _MinHash(itemsize)


def seen(kind: Dedup) -> Seen:
    """For the one process that sees all documents, in order. Raises `UserError` where the package is missing."""
    return _SeenTexts() if kind == "exact" else _SeenAlike()


class _TextHash:
    def of(self, texts: Sequence[str], tokens: Sequence[bytes]) -> bytes:
        digest = hashlib.blake2b(digest_size=_HASH_BYTES)
        for text in texts:
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.digest()


class _SeenTexts:
    def __init__(self) -> None:
        self._hashes: set[bytes] = set()

    def is_new(self, found: bytes) -> bool:
        before = len(self._hashes)
        self._hashes.add(found)
        return len(self._hashes) > before


class _MinHash:
    def __init__(self, itemsize: int) -> None:
        self._rensa, self._itemsize = _rensa(), itemsize

    def of(self, texts: Sequence[str], tokens: Sequence[bytes]) -> bytes:
        run = b"".join(tokens)
        size = _RUN * self._itemsize
        starts = range(0, max(len(run) - size, 0) + 1, self._itemsize)
        found = self._rensa.RMinHash(_HASHES, _SEED)
        found.update([run[at : at + size] for at in starts])
        return found.__getstate__()


class _SeenAlike:
    def __init__(self) -> None:
        self._rensa = _rensa()
        self._index = self._rensa.RMinHashDeduplicator(_SIMILAR, _HASHES, True, _BANDS, _SEED)
        self._count = 0

    def is_new(self, found: bytes) -> bool:
        self._count += 1
        hashes = self._rensa.RMinHash(_HASHES, _SEED)
        hashes.__setstate__(found)
        return self._index.add(str(self._count), hashes)


def _rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise UserError(lacks("--dedup minhash", "rensa")) from None
    return rensa
