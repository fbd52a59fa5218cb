"""Texts in parquet files, in slices whose size in memory is bounded, however well a file is packed."""

import faulthandler
import importlib.util
import os
import resource
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

import numpy as np

from vishwamai_mp.config.errors import UserError, one_line
from vishwamai_mp.config.wording import counted, lacks
from vishwamai_mp.data.streams import COMPRESSED_SUFFIXES

if TYPE_CHECKING:
    import pyarrow

_BUFFER_BYTES = 1 << 20
_MAX_ROW_GROUP_BYTES = 1 << 31  # of one column, unpacked
_MAX_PARQUET_RATIO = 100  # a parquet file is packed within; another program around it gains little


def require_pyarrow() -> None:
    """Refuse parquet files where nothing reads them.

    Raises:
        UserError: pyarrow is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(lacks("reading parquet", "pyarrow"))


def row_blocks(
    path: Path, stream: BinaryIO, columns: Sequence[str], block_bytes: int, max_document_bytes: int
) -> Iterator[tuple[int, bytes]]:
    """The rows of some columns, about `block_bytes` of text at a time: the first one's number, and an Arrow stream.

    Columns are read as dictionaries, in which a text that stands in many rows takes its space once, as in the file.

    Raises:
        UserError: no whole parquet file, a column that is not there or holds no text, more in a row or row group than
            is read.
    """
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as spool:
        if path.suffix in COMPRESSED_SUFFIXES:  # parquet is read from its end, a compressed stream is not
            _unpack(path, stream, spool)
            stream = spool
        try:
            metadata = pyarrow.parquet.read_metadata(stream)
            _check_footer(path, metadata)
            _check_columns(path, metadata.schema.to_arrow_schema(), columns)
            _check_row_groups(path, metadata, columns, max_document_bytes)
            size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            batch_rows = min(max(1, block_bytes * metadata.num_rows // max(size, 1)), 1 << 16)
            encodings = _encodings(metadata, columns)
            if any("DELTA_BYTE_ARRAY" in used for used in encodings.values()):
                batch_rows = 1  # a row's beginning is that of the row before: a page may unpack to any size
            file = pyarrow.parquet.ParquetFile(
                stream,
                metadata=metadata,
                read_dictionary=[name for name, used in encodings.items() if not any("DELTA" in one for one in used)],
                buffer_size=_BUFFER_BYTES,
            )
            row = 0
            for batch in file.iter_batches(batch_size=batch_rows, columns=columns):
                for some in _cut(path, row, _as_dictionaries(batch), block_bytes, max_document_bytes):
                    yield row, _as_bytes(some)
                    row += some.num_rows
        except (pyarrow.ArrowException, OSError, UnicodeError) as error:  # the last: of columns' names
            raise UserError(f"{path}: not a whole parquet file: {one_line(error)}") from error


def _encodings(metadata: "pyarrow.parquet.FileMetaData", columns: Sequence[str]) -> dict[str, set[str]]:
    """How the values of each column are written, in any row group. pyarrow reads none of DELTA_* as dictionaries."""
    found: dict[str, set[str]] = {column: set() for column in columns}
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for chunk in map(group.column, range(group.num_columns)):
            found.get(chunk.path_in_schema, set()).update(chunk.encodings)
    return found


def _as_dictionaries(batch: "pyarrow.RecordBatch") -> "pyarrow.RecordBatch":
    import pyarrow

    arrays = [
        array if pyarrow.types.is_dictionary(array.type) else array.dictionary_encode() for array in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def rows_of(data: bytes, columns: Sequence[str]) -> Iterator[tuple[bytes | None, ...]]:
    """The rows of an Arrow stream that `row_blocks` made."""
    import pyarrow

    table = pyarrow.ipc.open_stream(data).read_all()
    return zip(*(table.column(name).to_pylist() for name in columns), strict=True)


def _unpack(path: Path, stream: BinaryIO, spool: IO[bytes]) -> None:
    limit = _MAX_PARQUET_RATIO * path.stat().st_size + _BUFFER_BYTES
    while data := stream.read(_BUFFER_BYTES):
        if spool.tell() + len(data) > limit:
            raise UserError(f"{path}: unpacks to over {_MAX_PARQUET_RATIO} times its size, as no parquet file does")
        spool.write(data)
    spool.seek(0)


def _cut(
    path: Path, row: int, batch: "pyarrow.RecordBatch", block_bytes: int, max_document_bytes: int
) -> Iterator["pyarrow.RecordBatch"]:
    """A batch, whose first row is `row` of the file, in slices of about `block_bytes` of text."""
    import pyarrow.compute as compute

    sizes = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        lengths = compute.binary_length(column.dictionary).take(column.indices)
        sizes += lengths.fill_null(0).to_numpy(zero_copy_only=False)
    first, filled = 0, 0
    for at, size in enumerate(sizes.tolist()):
        if size > max_document_bytes:
            raise UserError(f"{path}:row {row + at}: over {max_document_bytes >> 20} MiB for one document: split it")
        if filled and filled + size > block_bytes:
            yield batch.slice(first, at - first)
            first, filled = at, 0
        filled += size
    if first < batch.num_rows:
        yield batch.slice(first)


def _as_bytes(batch: "pyarrow.RecordBatch") -> bytes:
    """An Arrow stream; as binary columns, because Arrow does not promise that a string is UTF-8."""
    import pyarrow

    columns = [column.dictionary_decode().cast(pyarrow.large_binary()) for column in batch.columns]
    decoded = pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, decoded.schema) as writer:
        writer.write_batch(decoded)
    return sink.getvalue().to_pybytes()


def _check_footer(path: Path, metadata: "pyarrow.parquet.FileMetaData") -> None:
    """What is said of each column is looked at by a child first: of a damaged footer it can end the process, for
    pyarrow does not turn that error of its C++ part into an exception."""
    child = os.fork()
    if not child:
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where C++ says why it ends
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                for number in range(group.num_columns):
                    group.column(number)
        finally:
            os._exit(0)  # an exception is for the parent, which will meet it too
    if os.waitpid(child, 0)[1]:
        raise UserError(f"{path}: not a whole parquet file: its footer is damaged")


def _check_columns(path: Path, schema: "pyarrow.Schema", keys: Sequence[str]) -> None:
    import pyarrow

    texts = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    for key in keys:
        found = schema.get_all_field_indices(key)
        if not found:
            raise UserError(f"{path}: no column {key!r} (columns: {', '.join(schema.names)})")
        if len(found) > 1:
            raise UserError(f"{path}: {len(found)} columns are named {key!r}: name them apart")
        column = schema.field(found[0]).type
        if pyarrow.types.is_dictionary(column):
            column = column.value_type
        if str(column) not in texts:
            raise UserError(f"{path}: column {key!r} is {column}, not text ({', '.join(texts)})")


def _check_row_groups(
    path: Path, metadata: "pyarrow.parquet.FileMetaData", keys: Sequence[str], max_document_bytes: int
) -> None:
    """A page of a column is unpacked whole, and may be as large as its row group."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            limit = min(_MAX_ROW_GROUP_BYTES, group.num_rows * max_document_bytes + _BUFFER_BYTES)
            if column.path_in_schema in keys and column.total_uncompressed_size > limit:
                raise UserError(
                    f"{path}: row group {number} has {column.total_uncompressed_size >> 20} MiB of"
                    f" {column.path_in_schema!r} in {counted(group.num_rows, 'row')}, at most {limit >> 20} can be"
                    " read: write it in smaller row groups"
                )
