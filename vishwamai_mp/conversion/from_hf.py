"""Imports a Llama-family Hugging Face folder as a checkpoint that training loads at any layout, in bounded memory.

The output is a run folder: `config.yaml`, the tokenizer where the folder has a SentencePiece model,
`generation_config.json` and Hugging Face's own tokenizer files, and `checkpoints/step_00000000` with weights only.
"""

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from tqdm import tqdm

from vishwamai_mp import __version__
from vishwamai_mp.checkpoint import manifest, store
from vishwamai_mp.checkpoint.manifest import FileRecord, Manifest, TensorRecord
from vishwamai_mp.checkpoint.writer import ChecksummedFile
from vishwamai_mp.config import PretrainConfig, to_yaml
from vishwamai_mp.config.files import write_through, write_whole
from vishwamai_mp.config.wording import counted
from vishwamai_mp.conversion.dtypes import DType
from vishwamai_mp.conversion.folder import Folder
from vishwamai_mp.conversion.journal import Files, Journal, check_space, disk_errors
from vishwamai_mp.conversion.mapping import padded_rows
from vishwamai_mp.conversion.new_tokens import NewTokens, with_new_rows, with_new_tokens, write_new_rows
from vishwamai_mp.conversion.rows import Piece, RowReader, pieces_of, stored_type
from vishwamai_mp.conversion.safetensors_files import plan_shards
from vishwamai_mp.conversion.to_hf import ahead
from vishwamai_mp.conversion.tokenizer_files import (
    generation_config,
    imported_files,
    with_named_templates,
    without_code,
)
from vishwamai_mp.data.corpus_tools import byte_bar
from vishwamai_mp.data.tokenizer import GENERATION_FILE

_FILE_BYTES = 2 << 30
_STEP = 0
_ADDED = "added"  # holds fresh components meanwhile


def import_folder(folder: Folder, output: Path, dtype: DType | None, new_tokens: Sequence[str] = ()) -> list[str]:
    """Write the run folder `output`, or continue where an interrupted import of the same stopped.

    Args:
        folder: checked.
        output: a new or empty folder.
        dtype: of the weights; None: as they are stored.
        new_tokens: that its tokenizer and vocabulary are to have besides.

    Returns:
        what the user should know.

    Raises:
        UserError: the output holds something else, the disk is full, a file is damaged, a token cannot be added.
    """
    kept, note = imported_files(folder.path, folder.config.model.vocab_size, len(new_tokens))
    tokenizer = {file.name: file.read_bytes() for file in kept}
    original, added = folder, with_new_tokens(kept, new_tokens) if new_tokens else None
    if added:
        folder, tokenizer = with_new_rows(folder, added), dict(added.files)
    tokenizer, of_code = without_code(tokenizer, original.path)
    tokenizer = with_named_templates(tokenizer, original.path)
    pieces = [piece for mapped in folder.mapping for piece in pieces_of(mapped, dtype or stored_type(folder, mapped))]
    files = {f"__0_{number}.distcp": group for number, group in enumerate(plan_shards(pieces, _FILE_BYTES))}
    config = _with_precision(folder.config, pieces[0].dtype)
    job = {
        "from": "hf",
        "folder": folder.digest,
        "dtype": dtype.option if dtype else None,
        "components": [asdict(config.memory), asdict(config.cache)],
        **({"new_tokens": list(new_tokens)} if new_tokens else {}),
    }
    generation = generation_config(folder.path, folder.token_ids)
    with disk_errors(output):
        journal = Journal(output, job)
        partial = output / "checkpoints" / f"{store.name_of(_STEP)}.converting"
        published = partial.with_name(store.name_of(_STEP))
        if published.exists():  # killed just before the end
            published.rename(partial)
        partial.mkdir(parents=True, exist_ok=True)
        todo = {name: group for name, group in files.items() if not _is_finished(partial / name, journal)}
        sizes = {name: sum(piece.size for piece in group) for name, group in files.items()}
        check_space(output, sum(sizes[name] for name in todo), f"--output {output}")
        done = sum(sizes.values()) - sum(sizes[name] for name in todo)
        if folder.added:
            from vishwamai_mp.conversion.added import write_components  # builds modules: rarely needed

            fresh = write_components(config, output / _ADDED)
            folder = replace(folder, entries={**folder.entries, **fresh})
        if added:
            rows = write_new_rows(original, added, output / _ADDED / "new_tokens.safetensors")
            folder = replace(folder, entries={**folder.entries, **rows})
        with byte_bar(sum(sizes.values()), "import", done) as progress:
            _write_files(folder, partial, todo, journal, progress)
        for name, content in tokenizer.items():
            write_whole(output / name, content)
        if generation:
            write_whole(output / GENERATION_FILE, json.dumps(generation, indent=2).encode() + b"\n")
        write_whole(output / "config.yaml", to_yaml(config).encode())
        folder = replace(folder, notes=(*folder.notes, *_not_finite(folder, files, journal)))
        _complete(partial, config, files, journal)
        store.publish(partial, _STEP)
        shutil.rmtree(output / _ADDED, ignore_errors=True)
        journal.close()
    others = _other_token_ids(folder.token_ids, generation)
    notes = [f"{folder.path}: {line}" for line in (note, of_code, others, *folder.notes) if line]
    return [*notes, *([_said(added, original.config.model.vocab_size, config.model.vocab_size)] if added else [])]


def _other_token_ids(described: Mapping[str, Any], generation: Mapping[str, Any]) -> str | None:
    """Ids of `config.json` that give way to others in `generation_config.json`."""
    told = [
        f"{name}={described[name]} of config.json gives way to {generation[name]} of {GENERATION_FILE}"
        for name in described
        if any(i not in _as_list(generation[name]) for i in _as_list(described[name]))
    ]
    return "; ".join(told) or None


def _as_list(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def _not_finite(folder: Folder, files: dict[str, list[Piece]], journal: Journal) -> list[str]:
    """A warning of weights that are NaN or infinite, by the names that the folder has for them."""
    found: Counter[str] = Counter()
    for name in files:
        found.update(journal.facts(name).get("not_finite", {}))
    if not found:
        return []
    theirs = {mapped.name: " + ".join(dict.fromkeys(part.name for part in mapped.parts)) for mapped in folder.mapping}
    named = [f"{count} of {theirs[name]}" for name, count in found.most_common(5)]
    more = f" and of {counted(len(found) - len(named), 'more tensor')}" if len(found) > len(named) else ""
    return [
        f"warning: {found.total()} weights are NaN or infinite, and were imported so: {', '.join(named)}{more};"
        " a model with them computes NaN: download it again, or from elsewhere"
    ]


def _said(added: NewTokens, before: int, now: int) -> str:
    told = ", ".join(f"{token} is {i}" for token, i in added.ids.items())
    room = f"the vocabulary grows from {before} to {now}" if now > before else f"the vocabulary of {now} has room"
    return f"new tokens: {told}; {room}; their rows are the mean of the others until they are trained"


def _with_precision(config: PretrainConfig, dtype: DType) -> PretrainConfig:
    return replace(config, precision=dtype.option)  # type: ignore[arg-type]


def _is_finished(path: Path, journal: Journal) -> bool:
    facts = journal.facts(path.name)
    return facts is not None and path.is_file() and path.stat().st_size == facts["file"]["size"]


def _write_files(
    folder: Folder, partial: Path, groups: dict[str, list[Piece]], journal: Journal, progress: tqdm
) -> None:
    reader = RowReader(folder)
    tensors = ahead(reader.read, [piece for group in groups.values() for piece in group], 2)
    with Files(journal) as files:
        for name, group in groups.items():
            raw, places = files.begin(partial / name), []
            file = ChecksummedFile(raw)
            unusable: dict[str, int] = {}
            for piece in group:
                start, tensor = file.size, next(tensors)
                if count := tensor.numel() - int(torch.isfinite(tensor).sum()):
                    unusable[piece.mapped.name] = unusable.get(piece.mapped.name, 0) + count
                file.save(tensor)
                places.append([start, file.size - start])
                progress.update(piece.size)
            facts = {"file": asdict(FileRecord(file.size, file.crc32)), "places": places, "not_finite": unusable}
            files.finish(raw, partial / name, facts)
    reader.close()


def _complete(partial: Path, config: PretrainConfig, files: dict[str, list[Piece]], journal: Journal) -> None:
    """Everything of a checkpoint but its tensors' files."""
    metadata = _metadata(files, journal)
    write_through(partial / ".metadata", pickle.dumps(metadata))
    torch.save({}, partial / "common.pt")  # megatron-core wants one
    save_config(CheckpointingConfig("torch_dist", 1), str(partial))
    write_through(partial / "trainer.json", json.dumps({"optimizer": [], "trainer": {}}, indent=1).encode())
    records = {name: FileRecord(**journal.facts(name)["file"]) for name in files}
    for path in partial.iterdir():
        if path.name not in records and path.name != manifest.NAME:
            records[path.name] = manifest.record_of(path)
    described = Manifest(
        step=_STEP,
        model=asdict(config.model),
        layout={
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": 1,
            "context_parallel_size": 1,
            "data_parallel_size": 1,
        },
        precision=config.precision,
        versions={"vishwamai_mp": __version__, "megatron-core": version("megatron-core"), "torch": torch.__version__},
        tensors={
            name: TensorRecord(list(record.size), str(record.properties.dtype).removeprefix("torch."))
            for name, record in sorted(metadata.state_dict_metadata.items())
            if isinstance(record, TensorStorageMetadata)
        },
        objects=[],
        files=dict(sorted(records.items())),
    )
    write_through(partial / manifest.NAME, described.to_json().encode())


def _metadata(files: dict[str, list[Piece]], journal: Journal) -> Metadata:
    """torch's description of where each piece lies."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, group in files.items():
        for piece, (start, length) in zip(group, journal.facts(name)["places"], strict=True):
            offsets, sizes = torch.Size(piece.offsets), torch.Size(piece.sizes)
            key = piece.mapped.name
            if key not in tensors:
                size = torch.Size((padded_rows(piece.mapped), *piece.mapped.shape[1:]))
                tensors[key] = TensorStorageMetadata(TensorProperties(dtype=piece.dtype.torch), size, [])
            places[MetadataIndex(key, offsets, len(tensors[key].chunks))] = _StorageInfo(name, start, length)
            tensors[key].chunks.append(ChunkStorageMetadata(offsets, sizes))
    return Metadata(tensors, storage_data=places)
