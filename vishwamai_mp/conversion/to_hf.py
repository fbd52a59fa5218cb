"""Exports a checkpoint to a Hugging Face folder, tensor by tensor: memory holds one or two of them, not the model.

Adapters are merged into the weights.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from vishwamai_mp.checkpoint.pieces import PieceReader, bytes_of
from vishwamai_mp.config import LoraConfig
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.conversion import components, dtypes, model_config, safetensors_files
from vishwamai_mp.conversion.adapters import merged
from vishwamai_mp.conversion.block_scaled import BLOCK, is_block_scaled, quantized
from vishwamai_mp.conversion.dtypes import BF16, FP8, FP32, DType
from vishwamai_mp.conversion.journal import Files, Journal, check_space, disk_errors
from vishwamai_mp.conversion.mapping import Mapped, Part
from vishwamai_mp.conversion.model_card import model_card
from vishwamai_mp.conversion.safetensors_files import Planned
from vishwamai_mp.conversion.source import Source
from vishwamai_mp.conversion.to_gguf import check_gguf, write_gguf
from vishwamai_mp.conversion.tokenizer_files import TokenizerFiles, generation_config, tokenizer_files
from vishwamai_mp.data.corpus_tools import byte_bar
from vishwamai_mp.data.tokenizer import tokenizer_file

T = TypeVar("T")
R = TypeVar("R")
_LINEARS = ("_proj", ".projection", ".output")  # what transformers has as linear layers, besides the head
_BLOCK_BYTES = 32 << 20  # converted and written at once
_TWO_BUFFERS_UP_TO = 1 << 30  # the next tensor is read while one is written, unless they are huge


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        dtype: of the weights; None: as they are stored.
        max_shard_size: bytes of tensors in a file.
        tokenizer: its file or folder; None: none in the output. The run folder's goes with the files beside it.
        chat_template: Jinja, for the tokenizer's files.
        gguf: one of `to_gguf.KINDS`: a file for llama.cpp is written into the folder as well; None: none is.
    """

    dtype: DType | None = None
    max_shard_size: int = 5_000_000_000
    tokenizer: Path | None = None
    chat_template: str | None = None
    gguf: str | None = None


@dataclass(frozen=True)
class _Output:
    """A Hugging Face tensor, with its scales where it is quantized, and what it is made of."""

    mapped: Mapped
    part: Part
    dtype: DType
    files: tuple[Planned, ...]


def export_folder(source: Source, output: Path, options: ExportOptions) -> list[str]:
    """Write `source` to the folder `output`, or continue where an interrupted export of the same stopped.

    Returns:
        what the user should know.

    Raises:
        UserError: the folder holds something else, the disk is full, the checkpoint is damaged.
    """
    if options.gguf:
        check_gguf(source, options.dtype)
    path = options.tokenizer and tokenizer_file(options.tokenizer)
    is_own = path is not None and path.parent.resolve() == source.run.resolve()
    tokenizer = tokenizer_files(path, source.config.model, options.chat_template, imported=is_own)
    kept = generation_config(source.run, {})
    outputs = _plan(source, options.dtype)
    shards = _shards(outputs, options.max_shard_size)
    job = {
        "to": "hf",
        "checkpoint": source.digest,
        "dtype": options.dtype.option if options.dtype else None,
        "max_shard_size": options.max_shard_size,
        **({"gguf": options.gguf} if options.gguf else {}),
    }
    with disk_errors(output):
        journal = Journal(output, job)
        names = [safetensors_files.shard_name(number, len(shards)) for number in range(len(shards))]
        sizes = [sum(planned.size for item in shard for planned in item.files) for shard in shards]
        todo = [number for number, name in enumerate(names) if not _is_finished(output / name, journal)]
        check_space(output, sum(sizes[number] for number in todo), f"--output {output}")
        done = sum(sizes) - sum(sizes[number] for number in todo)
        with PieceReader(source.path, source.manifest) as reader, byte_bar(sum(sizes), "export", done) as progress:
            chosen = [(names[number], shards[number]) for number in todo]
            _write_shards(reader, source.config.lora, output, chosen, journal, progress)
        _write_small_files(source, output, shards, tokenizer, kept)
        notes = [f"{output}: its tokenizer has added tokens: {added}"] if (added := tokenizer.added()) else []
        if options.gguf:
            file = output / f"{output.resolve().name}-{options.gguf}.gguf"
            notes += write_gguf(output, source.family, source.config.model, options.gguf, file)
        journal.close()
    return notes


def _plan(source: Source, dtype: DType | None) -> list[_Output]:
    outputs = []
    for mapped in source.mapping:
        stored = dtypes.of_manifest(source.manifest.tensors[mapped.name].dtype, mapped.name)
        for part in mapped.parts:
            chosen = dtype or stored
            files: tuple[Planned, ...]
            if chosen is FP8 and is_block_scaled(part):
                scales = tuple(length // BLOCK for length in part.shape)
                scale_name = part.name + "_scale_inv"
                files = (Planned(part.name, FP8.tag, part.shape), Planned(scale_name, FP32.tag, scales))
            else:
                chosen = BF16 if chosen is FP8 else chosen
                files = (Planned(part.name, chosen.tag, part.shape),)
            outputs.append(_Output(mapped, part, chosen, files))
    return outputs


def _shards(outputs: Sequence[_Output], most_bytes: int) -> list[list[_Output]]:
    """`plan_shards`, with a quantized tensor's scales in its file."""
    joined = {item.part.name: item for item in outputs}
    sums = [Planned(item.part.name, "U8", (sum(planned.size for planned in item.files),)) for item in outputs]
    return [[joined[planned.name] for planned in shard] for shard in safetensors_files.plan_shards(sums, most_bytes)]


def _planned(shard: Iterable[_Output]) -> list[Planned]:
    return [planned for item in shard for planned in item.files]


def _is_finished(path: Path, journal: Journal) -> bool:
    size = journal.facts(path.name)
    return size is not None and path.is_file() and path.stat().st_size == size


def _write_shards(
    reader: PieceReader,
    lora: LoraConfig,
    output: Path,
    shards: list[tuple[str, list[_Output]]],
    journal: Journal,
    progress: tqdm,
) -> None:
    """Write files one after another; the next checkpoint tensor is read meanwhile, across files too."""
    needed = [mapped for _, shard in shards for mapped in _tensors_of(shard)]
    largest = max((math.prod(reader.shapes[m.name]) * reader.dtypes[m.name].itemsize for m in needed), default=0)
    count = 2 if largest <= _TWO_BUFFERS_UP_TO else 1
    buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(count)]

    def read(item: tuple[int, Mapped]) -> Tensor:
        return merged(reader, item[1], reader.read(item[1].name, buffers[item[0] % count]), lora)

    tensors = ahead(read, list(enumerate(needed)), count)
    with Files(journal) as files:
        for name, shard in shards:
            file = files.begin(output / name)
            file.write(safetensors_files.header_of(_planned(shard)))
            held: Mapped | None = None
            for item in shard:
                if item.mapped is not held:
                    held, whole = item.mapped, next(tensors)
                _write_tensor(file, item, whole, progress)
            files.finish(file, output / name, file.tell())


def _tensors_of(shard: Iterable[_Output]) -> Iterator[Mapped]:
    """Each checkpoint tensor once; a file that begins in its middle reads it again."""
    held: Mapped | None = None
    for item in shard:
        if item.mapped is not held:
            held = item.mapped
            yield held


def ahead(read: Callable[[T], R], items: Sequence[T], depth: int) -> Iterator[R]:
    """`read` of each item, in a thread; while one result is in use, the next `depth` − 1 are being read."""
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(read, item))
            if len(pending) == depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _write_tensor(file: Any, item: _Output, whole: Tensor, progress: tqdm) -> None:
    if item.dtype is FP8:
        matrix = torch.cat([whole[first:last] for first, last in item.part.rows])
        for tensor in quantized(matrix):
            _write_numbers(file, tensor, progress)
        return
    for first, last in item.part.rows:
        rows = whole[first:last] if whole.dim() else whole.view(1)
        step = max(1, _BLOCK_BYTES // max(1, math.prod(rows.shape[1:]) * FP32.size))
        for start in range(0, len(rows), step):
            _write_numbers(file, dtypes.cast(rows[start : start + step], item.dtype, item.part.name), progress)


def _write_numbers(file: Any, tensor: Tensor, progress: tqdm) -> None:
    data = bytes_of(tensor.contiguous())
    file.write(data)
    progress.update(len(data))


def _write_small_files(
    source: Source, output: Path, shards: list[list[_Output]], tokenizer: TokenizerFiles, imported: dict[str, Any]
) -> None:
    dtype = shards[0][0].dtype
    generation = {**({} if imported else {"do_sample": False}), **tokenizer.token_ids, **imported}
    config = model_config.to_hf(source.config.model, dtype.name, generation, source.family)
    own = components.to_hf(source.config, source.value_head)
    config |= own
    kinds = {item.dtype for shard in shards for item in shard}
    if FP8 in kinds:
        # What transformers would otherwise convert: linears kept in bf16, because a block would reach over their edge.
        kept = [item.part.name.removesuffix(".weight") for shard in shards for item in shard if item.dtype is not FP8]
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": sorted({*(name for name in kept if name.endswith(_LINEARS)), "lm_head"}),
        }
    _write_json(output / "config.json", config)
    _write_json(output / "generation_config.json", generation)
    for name, content in (tokenizer.contents | (components.code_files() if own else {})).items():
        write_whole(output / name, content)
    card = model_card(source, config, dtype if FP8 not in kinds else FP8, tokenizer.added())
    write_whole(output / "README.md", card.encode())
    if len(shards) > 1:
        write_whole(output / safetensors_files.INDEX, safetensors_files.index_of([_planned(s) for s in shards]))


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
