"""An exported folder as one GGUF file, which llama.cpp runs: rows of a tensor at a time, read back before it counts.

Shapes: N rows of a tensor, I their width, D rows of a head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vishwamai_mp.checkpoint.pieces import bytes_of
from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.config.files import leftovers, written_whole
from vishwamai_mp.config.wording import lacks
from vishwamai_mp.conversion import dtypes, safetensors_files
from vishwamai_mp.conversion.families import Family
from vishwamai_mp.conversion.gguf_form import Form, form_of, metadata, rope_tensors
from vishwamai_mp.conversion.gguf_tokenizer import GgufTokenizer, read_tokenizer
from vishwamai_mp.conversion.safetensors_files import Entry
from vishwamai_mp.conversion.source import Source

KINDS = ("f32", "f16", "bf16", "q8_0")
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_BLOCK_NUMBERS = 8 << 20  # of a tensor held at a time
_Q8_WIDTH = 32


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file, made of one of the folder.

    Attributes:
        name: in the file.
        shape: as the folder has it.
        kind: one of `KINDS`.
        entry: of the folder; None: `values` are given.
        values: fp32.
        offset: added to each number.
        head: D, where its rows are reordered within heads; 0: they are not.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    entry: Entry | None = None
    values: torch.Tensor | None = None
    offset: float = 0.0
    head: int = 0

    def blocks(self) -> Iterator[np.ndarray]:
        """Rows, a few at a time, as the file has them."""
        gguf = library()
        kind = gguf.GGMLQuantizationType[self.kind.upper()]
        width = math.prod(self.shape[1:])
        step = max(1, _BLOCK_NUMBERS // width)
        if self.head:
            step = max(1, step // self.head) * self.head
        for first in range(0, self.shape[0], step):
            rows = self._rows(first, min(first + step, self.shape[0]))
            if self.head:
                rows = neighbours(rows, self.head)
            if self.kind == "f16" and bool((rows.half().isinf() & rows.isfinite()).any()):
                raise UserError(f"{self.name} has values beyond the range of f16 (65504); use --gguf bf16 or f32")
            yield gguf.quantize(np.ascontiguousarray(rows.numpy()), kind)

    def _rows(self, first: int, last: int) -> torch.Tensor:
        if self.values is not None:
            return self.values[first:last].float()
        assert self.entry is not None
        stored = dtypes.of_safetensors(self.entry.tag, self.entry.name)
        rows = torch.empty((last - first, *self.shape[1:]), dtype=stored.torch)
        with self.entry.path.open("rb") as file:
            file.seek(self.entry.start + first * math.prod(self.shape[1:]) * stored.size)
            if file.readinto(bytes_of(rows)) != rows.nbytes:
                raise UserError(f"{self.entry.path} is truncated within {self.entry.name}; export again")
        return rows.float() + self.offset if self.offset else rows.float()


class _Rows:
    """What the library's writer takes for an array: it asks for the number of bytes, and has them written."""

    def __init__(self, tensor: _Tensor, nbytes: int) -> None:
        self._tensor, self.nbytes = tensor, nbytes

    def tofile(self, file: Any) -> None:
        for block in self._tensor.blocks():
            block.tofile(file)


def library() -> Any:
    """The package `gguf`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(lacks("--gguf", "gguf")) from None
    return gguf


def check_gguf(source: Source, dtype: dtypes.DType | None) -> None:
    """Refuse, before anything is written, what no file can be written of.

    Raises:
        UserError: it says why.
    """
    library()
    parts = [name for name in ("memory", "cache") if getattr(source.config, name).enabled]
    if parts := parts + ["value head"] * source.value_head:
        raise UserError(f"--gguf: llama.cpp has no {' and no '.join(parts)}, which {source.path} has; leave --gguf out")
    if dtype is dtypes.FP8:
        raise UserError("--gguf with --dtype fp8: it would be made of rounded weights; export them one by one")
    form_of(source.family, source.config.model)


def neighbours(rows_NI: torch.Tensor, head: int) -> torch.Tensor:
    """Rows of heads whose halves are turned together, so that neighbours are: 0, D/2, 1, D/2 + 1, …"""
    halves = rows_NI.reshape(-1, 2, head // 2, *rows_NI.shape[1:])
    return halves.transpose(1, 2).reshape(rows_NI.shape)


def write_gguf(folder: Path, family: type[Family], model: ModelConfig, kind: str, output: Path) -> list[str]:
    """Write the file, and read it back.

    Args:
        folder: as exported, with weights in fp32, bf16 or fp16.
        family: its.
        model: resolved.
        kind: one of `KINDS`; norms and biases are always f32.
        output: the file; it gets its name when it is whole.

    Returns:
        what the user should know.

    Raises:
        UserError: llama.cpp would not compute the model as it is, or its tokenizer.
    """
    gguf = library()
    form = form_of(family, model)
    tokenizer = read_tokenizer(folder, model.vocab_size)
    tensors = _tensors(folder, family, form, model, kind)
    for leftover in leftovers(output.parent, output.name):  # of a killed export
        leftover.unlink()
    with written_whole(output) as aside:
        writer = gguf.GGUFWriter(aside, form.name)
        _describe(writer, form, model, tokenizer, kind, folder.resolve().name)
        for tensor in tensors:
            _announce(writer, tensor)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_Rows(tensor, _nbytes(tensor)))
        finally:
            writer.close()
        _check(aside, tensors)
    coarse = sorted({tensor.kind for tensor in tensors if len(tensor.shape) > 1 and tensor.kind != kind})
    notes = [f"tensors whose rows are no multiple of {_Q8_WIDTH} are {coarse[0]}, not {kind}"] if coarse else []
    return [f"{output.name}: {note}" for note in (*notes, *tokenizer.notes)]


def _tensors(folder: Path, family: type[Family], form: Form, model: ModelConfig, kind: str) -> list[_Tensor]:
    gguf = library()
    architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == form.name)
    names = gguf.get_tensor_name_map(architecture, model.num_layers)
    weights = family.weights
    turned = tuple(f"{weights.layer.rpartition('{}.')[2]}{part}." for part in (weights.queries, weights.keys))
    found = []
    for name, entry in safetensors_files.read_folder(folder).items():
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise UserError(f"--gguf: llama.cpp's {form.name} has no place for {name}")
        is_norm = name.endswith("norm.weight")
        is_turned = form.turns_neighbours and any(part in name for part in turned)
        assert model.head_dim is not None
        found.append(
            _Tensor(
                called,
                entry.shape,
                _kind(entry.shape, kind, is_norm),
                entry,
                offset=form.norm_offset if is_norm else 0.0,
                head=model.head_dim if is_turned else 0,
            )
        )
        if name == f"{weights.embedding}.weight" and model.tie_word_embeddings and form.head == "own":
            found.append(_Tensor("output.weight", entry.shape, _kind(entry.shape, kind, False), entry))
    extra = rope_tensors(model).items()
    return [*(_Tensor(name, tuple(values.shape), "f32", values=values) for name, values in extra), *found]


def _kind(shape: tuple[int, ...], kind: str, is_norm: bool) -> str:
    if len(shape) < 2 or is_norm:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _Q8_WIDTH else kind


def _describe(writer: Any, form: Form, model: ModelConfig, tokenizer: GgufTokenizer, kind: str, name: str) -> None:
    gguf = library()
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    described = {f"{form.name}.{key}": value for key, value in metadata(form, model).items()}
    for key, value in {**described, **{f"tokenizer.{key}": value for key, value in tokenizer.keys.items()}}.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)


def _nbytes(tensor: _Tensor) -> int:
    gguf = library()
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, gguf.GGMLQuantizationType[tensor.kind.upper()])
    return math.prod(shape)


def _announce(writer: Any, tensor: _Tensor) -> None:
    gguf = library()
    kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
    plain = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}.get(tensor.kind)
    shape = tensor.shape if plain else gguf.quant_shape_to_byte_shape(tensor.shape, kind)
    writer.add_tensor_info(tensor.name, shape, plain or np.dtype(np.uint8), _nbytes(tensor), kind)


def _check(path: Path, tensors: list[_Tensor]) -> None:
    """Read the file with the library's reader: every tensor has its name, shape, type and numbers.

    Raises:
        UserError: it says which has not.
    """
    gguf = library()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in tensors:
        read = found.pop(tensor.name, None)
        is_right = (
            read is not None
            and tuple(int(length) for length in reversed(read.shape)) == tensor.shape
            and read.tensor_type.name.lower() == tensor.kind
        )
        data, start = (read.data.reshape(-1).view(np.uint8) if read is not None else None), 0
        for block in tensor.blocks() if is_right else ():
            raw = block.reshape(-1).view(np.uint8)
            is_right &= bool(np.array_equal(data[start : start + len(raw)], raw))  # type: ignore[index]
            start += len(raw)
        if not is_right:
            raise UserError(f"{path}: {tensor.name} was not read back as it was written; is the disk sound?")
    assert not found
