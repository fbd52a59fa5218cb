"""Safetensors files read and written as streams: a header in JSON, then the tensors one after another.

The format (huggingface.co/docs/safetensors): 8 bytes, the header's length; the header, `{name: {dtype, shape,
data_offsets}}`; the data. Here a tensor is a place in a file, which may be larger than memory. The package of that
name cannot write one tensor after another (`save_file` wants all of a file's at once), and does not tell where in a
file a tensor lies: its `safe_open` maps the file into memory, where reading rows of a file that is cut short or on a
failing disk ends the process by a signal instead of an error that names the file. Needs no torch.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vishwamai_mp.config import UserError
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BLOCK_BYTES = 16 << 20
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: `start` counts bytes from the file's beginning.

    Numbers that are quantized in blocks of so many rows and columns have `scales`, one for each block.
    """

    name: str
    tag: str
    shape: tuple[int, ...]
    path: Path
    start: int
    scales: "Entry | None" = None
    block: tuple[int, int] = (1, 1)

    @property
    def size(self) -> int:
        """Bytes."""
        return _bytes(self.tag, self.shape)


class HasSize(Protocol):
    """Something that takes space in a file."""

    @property
    def size(self) -> int:
        """Bytes."""


_Sized = TypeVar("_Sized", bound=HasSize)


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    tag: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return _bytes(self.tag, self.shape)


def read_folder(folder: Path) -> dict[str, Entry]:
    """The tensors of a folder, from one file or from those that its index names.

    Raises:
        UserError: no safetensors files, a damaged one, or an index that says what the files do not.
    """
    if (folder / INDEX).is_file():
        found = _read_indexed(folder)
        single = folder / SINGLE
        if single.is_file() and all(entry.path != single for entry in found.values()):
            raise UserError(
                f"{folder} has {SINGLE}, and {INDEX}, which names other files: take away what is not the model"
            )
        return found
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} has its weights as pickles ({pickled[0]}), and unpickling a file can run any program in it;"
            " convert it to safetensors where you trust it (transformers' save_pretrained writes them)"
        )
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}")


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file.

    Raises:
        UserError: it is no whole safetensors file.
    """
    try:
        refuse_pointer_or_pipe(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MOST_HEADER_BYTES:
                raise UserError(f"{path} is no safetensors file (its header would have {length} bytes)")
            raw, size = file.read(length), os.fstat(file.fileno()).st_size
        header = parse_json(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(name, record, path, 8 + length) for name, record in header.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no whole safetensors file (its header cannot be read)") from None
    needed = max((entry.start + entry.size for entry in entries.values()), default=8 + length)
    if size < needed:
        raise UserError(f"{path} is truncated: {size} bytes of {needed}; copy it again")
    return entries


def _entry(name: str, record: dict[str, Any], path: Path, data: int) -> Entry:
    first, last = record["data_offsets"]
    entry = Entry(name, record["dtype"], tuple(int(length) for length in record["shape"]), path, data + int(first))
    if entry.tag in _SIZES and (first < 0 or last - first != entry.size):
        raise UserError(f"{path}: {name} has {last - first} bytes, its shape and type say {entry.size}")
    return entry


def are_equal(left: Entry, right: Entry) -> bool:
    """Whether two tensors have the same type, shape and bytes. Holds a block of each at a time."""
    if (left.tag, left.shape) != (right.tag, right.shape):
        return False
    with left.path.open("rb") as one, right.path.open("rb") as other:
        one.seek(left.start)
        other.seek(right.start)
        for start in range(0, left.size, _BLOCK_BYTES):
            count = min(_BLOCK_BYTES, left.size - start)
            if one.read(count) != other.read(count):
                return False
    return True


def _read_indexed(folder: Path) -> dict[str, Entry]:
    path = folder / INDEX
    refuse_pointer_or_pipe(path)
    try:
        places = {str(name): str(file) for name, file in parse_json(path.read_bytes())["weight_map"].items()}
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} cannot be read, or has no weight_map") from None
    files: dict[str, dict[str, Entry]] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise UserError(f"{path} names {file!r}, which is not a file of the folder")
        try:
            is_there = (folder / file).is_file()
        except OSError:  # a name that is longer than names can be
            is_there = False
        if not is_there:
            raise UserError(f"{path} names {file}, which is missing; copy it again")
        files[file] = read_header(folder / file)
    for name, file in places.items():
        if name not in files[file]:
            raise UserError(f"{path} says that {name} is in {file}, which does not have it")
    for file, entries in files.items():
        for name in entries:
            if places.get(name) != file:
                raise UserError(f"{folder / file} has {name}, which {path.name} does not place there")
    return {name: files[file][name] for name, file in places.items()}


def plan_shards(tensors: Sequence[_Sized], most_bytes: int) -> list[list[_Sized]]:
    """Cut a list of tensors, in order, into files of at most `most_bytes` of data, or one tensor where that is more."""
    shards: list[list[_Sized]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def shard_name(index: int, count: int) -> str:
    """The file's name, as transformers has it."""
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def header_of(tensors: Sequence[Planned]) -> bytes:
    """The beginning of a file that holds these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        ends = [offset, offset + tensor.size]
        header[tensor.name] = {"dtype": tensor.tag, "shape": list(tensor.shape), "data_offsets": ends}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def index_of(shards: Sequence[Sequence[Planned]]) -> bytes:
    """The content of the index of several files."""
    places = {tensor.name: shard_name(number, len(shards)) for number, shard in enumerate(shards) for tensor in shard}
    total = sum(tensor.size for shard in shards for tensor in shard)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2).encode() + b"\n"


def _bytes(tag: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _SIZES.get(tag, 0)
