"""Opening an input file by its suffix: plain, gzip or Zstandard, with damage told from the end of the file.

A read unpacks no more than it asks for, however well the file is packed. Zstandard frames that refer back further than
`ZSTD_WINDOW_LOG` allows are refused, for what they refer to is held in memory.
"""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vishwamai_mp.config.errors import UserError, one_line
from vishwamai_mp.config.pointers import refuse_pointer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSED_SUFFIXES = (".gz", ".zst")
ZSTD_WINDOW_LOG = 27  # 128 MiB, the most that the zstd program takes without --long
_ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
_BUFFER_BYTES = 1 << 20


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed bytes of `path`, and the file itself, whose `tell()` is the progress through it.

    Any failure to read inside the `with` block, damage of a compressed stream included, becomes one `UserError`.
    """
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=file) as unzipped, io.BufferedReader(unzipped, _BUFFER_BYTES) as stream:
                    yield stream, file
            elif path.suffix == ".zst":
                with (
                    zstd.ZstdFile(file, options=_ZSTD_OPTIONS) as frames,
                    io.BufferedReader(frames, _BUFFER_BYTES) as stream,
                ):
                    yield stream, file
            else:
                yield file, file
    except FileNotFoundError:
        raise UserError(f"no input file {path}") from None
    except (gzip.BadGzipFile, zlib.error, EOFError, zstd.ZstdError) as error:
        if "too much memory" in str(error):
            raise UserError(
                f"{path}: its Zstandard window is too large, over {1 << ZSTD_WINDOW_LOG - 20} MiB;"
                " unpack it first, with zstd -d --long=31"
            ) from error
        raise UserError(f"{path}: damaged or cut short {path.suffix[1:]} data: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
