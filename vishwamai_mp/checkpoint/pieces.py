"""Reads single tensors of a `torch_dist` checkpoint straight from its files, without unpickling into live objects.

A tensor is stored in pieces, one per rank that held one; a piece is what `torch.save` writes for a tensor, a zip
archive with the numbers uncompressed, somewhere within a `.distcp` file. `.metadata` says which piece lies where.
Numbers are read directly into the place where they belong, and checked against the archive's own CRC-32.
"""

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from vishwamai_mp.checkpoint import restricted_reading
from vishwamai_mp.checkpoint.manifest import Manifest
from vishwamai_mp.config import UserError

_READERS = 2  # pieces read at once: one waits for the disk while another is checksummed
_LOCAL_HEADER = 30  # bytes of a zip entry's own header before its name


@dataclass(frozen=True)
class _Piece:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Stored:
    """The tensor of one piece: where its numbers lie in the file, and their checksum."""

    start: int
    size: int
    crc32: int


class PieceReader:
    """The tensors of a checkpoint.

    Args:
        folder: the checkpoint.
        manifest: its; only files that it names are read.

    Raises:
        UserError: `.metadata` is unsafe or does not describe whole tensors.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        metadata = restricted_reading.read_metadata(folder)
        self._pieces: dict[str, list[_Piece]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        stored = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        for name, record in metadata.state_dict_metadata.items():
            if not isinstance(record, TensorStorageMetadata):
                continue
            self.shapes[name], self.dtypes[name] = tuple(record.size), record.properties.dtype
            pieces = []
            for chunk in record.chunks:
                info = stored.get((name, tuple(chunk.offsets)))
                if info is None or info.relative_path not in manifest.files:
                    raise UserError(f"{folder}/.metadata does not say in which file of the checkpoint {name} lies")
                place = (info.relative_path, info.offset, info.length)
                pieces.append(_Piece(tuple(chunk.offsets), tuple(chunk.sizes), *place))
            if not _fill(pieces, tuple(record.size)):
                raise UserError(
                    f"{folder}/.metadata: the pieces of {name} do not make up its shape {self.shapes[name]}"
                )
            self._pieces[name] = pieces
        self._pool = ThreadPoolExecutor(_READERS)
        self._files: dict[str, int] = {}

    def __enter__(self) -> "PieceReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, name: str, buffer: Tensor) -> Tensor:
        """The whole tensor, padding of the vocabulary included.

        Args:
            name: in the checkpoint.
            buffer: uint8, 1-D, as large as the tensor or larger; the result lies in it.

        Raises:
            UserError: the files are damaged or not what `.metadata` says.
        """
        shape, dtype = self.shapes[name], self.dtypes[name]
        flat = buffer[: math.prod(shape) * dtype.itemsize]
        whole = flat.view(dtype).view(shape)
        jobs = [self._pool.submit(self._read_piece, name, piece, whole) for piece in self._pieces[name]]
        for job in jobs:
            job.result()
        return whole

    def _read_piece(self, name: str, piece: _Piece, whole: Tensor) -> None:
        try:
            descriptor = self._descriptor(piece.file)
            stored = _locate(descriptor, piece, whole.dtype)
            target = whole
            for dim, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                target = target.narrow(dim, offset, size)
            place = target if target.is_contiguous() else torch.empty(piece.sizes, dtype=whole.dtype)
            crc = _read_into(descriptor, place, stored.start)
        except _Malformed as error:
            raise UserError(f"{self.folder / piece.file}: {name} cannot be read ({error})") from None
        except OSError as error:
            raise UserError(f"{self.folder / piece.file} cannot be read ({error.strerror})") from None
        if crc != stored.crc32:
            raise UserError(f"{self.folder / piece.file} is damaged: the checksum of {name} differs")
        if place is not target:
            target.copy_(place)

    def _descriptor(self, file: str) -> int:
        if file not in self._files:
            # Two threads may both open it; the one that loses the race closes its own.
            opened = os.open(self.folder / file, os.O_RDONLY)
            if self._files.setdefault(file, opened) != opened:
                os.close(opened)
        return self._files[file]


def _fill(pieces: list[_Piece], shape: tuple[int, ...]) -> bool:
    """Whether the pieces lie within the shape and have as many elements."""
    inside = all(
        0 <= offset <= offset + size <= length
        for piece in pieces
        for offset, size, length in zip(piece.offsets, piece.sizes, shape, strict=True)
    )
    return inside and sum(math.prod(piece.sizes) for piece in pieces) == math.prod(shape)


class _Malformed(Exception):  # noqa: N818 (turned into a UserError where the file's name is known)
    pass


class _Window(io.RawIOBase):
    """A piece as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length = descriptor, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._length - self._position))
        data = os.pread(self._descriptor, wanted, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _Storage:
    """What a pickled tensor says of its storage."""

    def __init__(self, kind: str, key: str, elements: int) -> None:
        self.kind, self.key, self.elements = kind, key, elements


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> tuple[Any, Any, Any, Any]:
    return storage, offset, size, stride


class _Describe(pickle.Unpickler):
    """Reads the pickle of a saved tensor as a description. Nothing but what is named here can be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, elements = pid
        return _Storage(kind, key, elements)


_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}


def _locate(descriptor: int, piece: _Piece, dtype: torch.dtype) -> _Stored:
    window = _Window(descriptor, piece.start, piece.length)
    try:
        with zipfile.ZipFile(io.BufferedReader(window, 4096)) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            storage, offset, size, stride = _Describe(io.BytesIO(archive.read(entries["data.pkl"]))).load()
            data = entries[f"data/{storage.key}"]
            order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
        window.seek(data.header_offset)
        header = window.read(_LOCAL_HEADER)
        name_length, extra_length = struct.unpack("<26xHH", header)
    except Exception as error:  # a damaged archive or pickle raises nearly anything
        raise _Malformed(" ".join(f"{type(error).__name__}: {error}".split())) from None
    expected = math.prod(piece.sizes) * dtype.itemsize
    is_plain = data.compress_type == zipfile.ZIP_STORED and order == b"little" and offset == 0
    if not is_plain or _STORAGES.get(storage.kind) != dtype or data.file_size != expected:
        raise _Malformed(f"expected {expected} bytes of {dtype}, uncompressed")
    if tuple(size) != piece.sizes or not _is_row_major(tuple(size), tuple(stride)):
        raise _Malformed(f"expected the shape {piece.sizes}, row by row")
    start = data.header_offset + _LOCAL_HEADER + name_length + extra_length
    if start + expected > piece.length:
        raise _Malformed("it ends too early")
    return _Stored(piece.start + start, expected, data.CRC)


def _is_row_major(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        if length > 1 and step != expected:
            return False
        expected *= length
    return True


def _read_into(descriptor: int, target: Tensor, start: int) -> int:
    """Fill a contiguous tensor from the file; the CRC-32 of what was read."""
    view = bytes_of(target)
    done, crc = 0, 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + (8 << 20)]], start + done)
        if count == 0:
            raise _Malformed("the file ends too early")
        crc = zlib.crc32(view[done : done + count], crc)
        done += count
    return crc


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
