"""Opening an input file by its suffix: plain, gzip or Zstandard, with damage told from the end of the file."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from vishwamai_mp.config.errors import UserError

COMPRESSED_SUFFIXES = (".gz", ".zst")
_BUFFER_BYTES = 1 << 20


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed bytes of `path`, and the file itself, whose `tell()` is the progress through it.

    Any failure to read inside the `with` block, damage of a compressed stream included, becomes one `UserError`.
    """
    try:
        with path.open("rb") as file:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=file) as unzipped, io.BufferedReader(unzipped, _BUFFER_BYTES) as stream:
                    yield stream, file
            elif path.suffix == ".zst":
                with io.BufferedReader(_ZstandardReader(file), _BUFFER_BYTES) as stream:
                    yield stream, file
            else:
                yield file, file
    except FileNotFoundError:
        raise UserError(f"no input file {path}") from None
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged or cut short {path.suffix[1:]} data: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or ' '.join(str(error).split())}") from error


class _ZstandardReader(io.RawIOBase):
    """Raw reader over one or more Zstandard frames that raises where the last one is cut short."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._in_frame = False
        self._pending = b""
        self._decoded = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._decoded:
            compressed = self._pending or self._file.read(1 << 16)
            if not compressed:
                if self._in_frame:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._decoded = memoryview(self._decompress(compressed))
        count = min(len(buffer), len(self._decoded))
        buffer[:count] = self._decoded[:count]
        self._decoded = self._decoded[count:]
        return count

    def _decompress(self, compressed: bytes) -> bytes:
        self._in_frame = True
        decoded = self._frame.decompress(compressed)
        self._pending = b""
        if self._frame.eof:
            self._pending = self._frame.unused_data
            self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._in_frame = False
        return decoded
