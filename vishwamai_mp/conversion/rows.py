"""Reads checkpoint tensors, a few rows at a time, from the safetensors files of a Hugging Face folder."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vishwamai_mp.checkpoint.pieces import bytes_of
from vishwamai_mp.config import UserError
from vishwamai_mp.conversion import dtypes
from vishwamai_mp.conversion.block_scaled import dequantized
from vishwamai_mp.conversion.dtypes import FP8, FP32, DType
from vishwamai_mp.conversion.folder import Folder
from vishwamai_mp.conversion.mapping import Mapped, padded_rows
from vishwamai_mp.conversion.safetensors_files import Entry

_PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece:
    """Rows of a checkpoint tensor, stored together."""

    mapped: Mapped
    dtype: DType
    first: int
    last: int

    @property
    def offsets(self) -> tuple[int, ...]:
        return (self.first, *[0] * (len(self.mapped.shape) - 1))

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.last - self.first, *self.mapped.shape[1:])

    @property
    def size(self) -> int:
        return math.prod(self.sizes) * self.dtype.size


def stored_type(folder: Folder, mapped: Mapped) -> DType:
    """The type of a tensor's parts, fp32 where they differ.

    What the folder lacks, and what is quantized there, has that of the embedding.
    """
    embedding = folder.mapping[0].parts[0].name
    found = [folder.entries[part.name] for part in mapped.parts if part.name in folder.entries]
    names = [embedding if entry.scales else entry.name for entry in found] or [embedding]
    kinds = [dtypes.of_safetensors(folder.entries[name].tag, name) for name in names]
    if FP8 in kinds:
        raise UserError(f"{mapped.parts[0].name} is quantized; give the folder with the original weights")
    return kinds[0] if len(set(kinds)) == 1 else FP32


def pieces_of(mapped: Mapped, dtype: DType) -> Iterator[Piece]:
    """A tensor, padding of the vocabulary included, in pieces of a few rows: so much is held at once."""
    rows = padded_rows(mapped) if mapped.shape else 1
    step = max(1, _PIECE_BYTES // (math.prod(mapped.shape[1:]) * dtype.size))
    for first in range(0, rows, step):
        yield Piece(mapped, dtype, first, min(first + step, rows))


class RowReader:
    """Reads pieces of checkpoint tensors from the rows of safetensors files."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._files: dict[Path, int] = {}

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, piece: Piece) -> Tensor:
        """The piece; rows that belong to no token are zero."""
        out = torch.zeros(piece.sizes, dtype=piece.dtype.torch)
        for part in piece.mapped.parts:
            entry, row = self._folder.entries[part.name], 0  # row: of the Hugging Face tensor
            for first, last in part.rows:
                low, high = max(first, piece.first), min(last, piece.last)
                if low < high:
                    self._fill(out[low - piece.first : high - piece.first], entry, row + low - first, piece.dtype)
                row += last - first
        return out

    def _fill(self, target: Tensor, entry: Entry, row: int, dtype: DType) -> None:
        stored = dtypes.of_safetensors(entry.tag, entry.name)
        place = target if stored == dtype else torch.empty(target.shape, dtype=stored.torch)
        self._read(place, entry, row * math.prod(entry.shape[1:]) * stored.size)
        if scales := entry.scales:
            size = entry.block[0]
            first, last = row // size, -(-(row + len(place)) // size)
            each = torch.empty((last - first, scales.shape[1]), dtype=torch.float32)
            self._fill(each, scales, first, FP32)
            place = dequantized(place, each, entry.block, row % size)
        if place is not target:
            target.copy_(dtypes.cast(place, dtype, entry.name))

    def _read(self, place: Tensor, entry: Entry, offset: int) -> None:
        """Fill a tensor from a place in another's bytes."""
        start = entry.start + offset
        view, done = bytes_of(place), 0
        while done < len(view):
            count = os.preadv(self._descriptor(entry.path), [view[done:]], start + done)
            if count == 0:
                raise UserError(f"{entry.path} is truncated within {entry.name}; copy it again")
            done += count

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]
