"""A Hugging Face folder that is to be imported: its tensors, checked against the table of tensors.

What of a folder is not imported is named in its notes: files, tensors that follow from others, keys of `config.json`.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vishwamai_mp.config import PretrainConfig, UserError, load_config, resolve, to_dict
from vishwamai_mp.config.pointers import refuse_pointer
from vishwamai_mp.config.wording import counted
from vishwamai_mp.conversion import components, model_config, quantized_weights, safetensors_files
from vishwamai_mp.conversion.families import Family, family_of
from vishwamai_mp.conversion.mapping import Mapped, nearest, plain_mapping
from vishwamai_mp.conversion.model_config import without_effect
from vishwamai_mp.conversion.safetensors_files import INDEX, Entry
from vishwamai_mp.conversion.tokenizer_files import named_templates
from vishwamai_mp.data.tokenizer import MODEL_FILE, companions

_BUFFERS = (".rotary_emb.inv_freq",)  # they follow from rope_theta; early Llamas' folders have them


@dataclass(frozen=True)
class Folder:
    """A folder with all tensors that its `config.json` asks for.

    Attributes:
        path: of the folder.
        config: ours, of its model.
        mapping: the checkpoint's tensors and what of the folder makes them up.
        entries: the folder's tensors by name.
        added: names of the components' tensors that are to be made, in Hugging Face's spelling; the folder lacks them.
        digest: names the folder's content.
        token_ids: `bos_token_id` and the like, as `config.json` has them.
        notes: what the user should know.
    """

    path: Path
    config: PretrainConfig
    mapping: list[Mapped]
    entries: Mapping[str, Entry]
    added: frozenset[str]
    digest: str
    token_ids: Mapping[str, Any]
    notes: tuple[str, ...]


def open_folder(path: Path, additions: Sequence[str] = (), own: type[Family] | None = None) -> Folder:
    """Check a folder.

    Args:
        path: of the folder.
        additions: `memory.key=value` and `cache.key=value`: components that the model is to have besides.
        own: the user's own family, by which the folder is read.

    Raises:
        UserError: not a model that can be converted, or tensors missing, left over or of another shape.
    """
    described = model_config.read_config(path)
    _refuse_pointers(path)
    tensors = safetensors_files.read_folder(path)  # before what is said of the model: pickles are refused as such
    family = family_of(described, path / "config.json", own)
    tensors = quantized_weights.with_scales(tensors, quantized_weights.block_of(described, path / "config.json"), path)
    original = model_config.from_hf(described, path / "config.json", family)
    unknown = without_effect(described, family)
    notes = [f"{key} of config.json, which is unknown here and switched off" for key in unknown]
    entries = {name: entry for name, entry in tensors.items() if not name.endswith(_BUFFERS)}
    if buffers := len(tensors) - len(entries):
        notes.append(f"{counted(buffers, 'tensor')} *{_BUFFERS[0]}, computed from rope_theta")
    files = {entry.path for entry in entries.values()}
    notes += _unread(path, files)
    notes = [f"left behind: {'; '.join(notes)}"] if notes else []
    if scaled := sum(entry.scales is not None for entry in entries.values()):
        notes.append(f"{scaled} matrices are FP8 in blocks, and are imported as the numbers that these mean")
    head, embedding = f"{family.weights.head}.weight", f"{family.weights.embedding}.weight"
    if original.model.tie_word_embeddings and head in entries and embedding in entries:
        if safetensors_files.are_equal(entries[head], entries[embedding]):
            del entries[head]
        else:
            notes.append(
                f"config.json has tie_word_embeddings=true, but {head} is not {embedding}: both are imported, untied"
            )
            described = {**described, "tie_word_embeddings": False}
            original = model_config.from_hf(described, path / "config.json", family)
    if original.model.num_layers > len(entries):
        raise UserError(
            f"{path / 'config.json'}: num_hidden_layers={original.model.num_layers}, and the folder has"
            f" {counted(len(entries), 'tensor')} only; one of them is of another model"
        )
    config = _with_additions(original, additions, path)
    shapes = {name: entry.shape for name, entry in entries.items()}
    value_head = components.has_value_head(shapes)
    expected = [*plain_mapping(config.model, family.weights), *components.component_mapping(original, value_head)]
    _check(path, shapes, expected)
    table = [*plain_mapping(config.model, family.weights), *components.component_mapping(config, value_head)]
    added = frozenset(part.name for mapped in table for part in mapped.parts if part.name not in entries)
    ids = model_config.token_ids(described)
    return Folder(path, config, table, entries, added, _digest(files), ids, tuple(notes))


def _refuse_pointers(path: Path) -> None:
    for file in sorted(path.iterdir()):
        if file.is_file():
            refuse_pointer(file)


def _unread(path: Path, weights: Collection[Path]) -> list[str]:
    """Files and folders that nothing is taken from."""
    read = {*weights, *companions(path / MODEL_FILE), *(path / name for name in ("config.json", INDEX, MODEL_FILE))}
    read |= {path / name for name in components.code_files()}
    read |= {file.parent for file in named_templates(path)}
    return [file.name for file in sorted(path.iterdir()) if file not in read]


def _with_additions(config: PretrainConfig, additions: Sequence[str], path: Path) -> PretrainConfig:
    """The configuration with more components."""
    for addition in additions:
        section = addition.partition("=")[0].partition(".")[0]
        if section not in ("memory", "cache"):
            raise UserError(f"{addition}: only memory.* and cache.* can be added to an imported model")
        if getattr(config, section).enabled:
            raise UserError(f"{addition}: the model of {path} has a {section} already")
    return resolve(load_config(to_dict(config), additions)) if additions else config


def _check(path: Path, shapes: Mapping[str, tuple[int, ...]], table: list[Mapped]) -> None:
    expected = {part.name: part.shape for mapped in table for part in mapped.parts}
    missing = [name for name in expected if name not in shapes]
    extra = sorted(shapes.keys() - expected.keys())
    if missing:
        raise UserError(f"{path} lacks {missing[0]}{_more(missing)}{nearest(missing[0], extra)}")
    if extra:
        hint = nearest(extra[0], expected)
        raise UserError(f"{path} has {extra[0]}{_more(extra)}, which its model has not{hint}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(f"{path}: {name} has the shape {list(shapes[name])}, config.json says {list(shape)}")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _digest(files: Iterable[Path]) -> str:
    """By names, sizes and times, not by content: a folder is not read twice."""
    digest = hashlib.sha256()
    for file in sorted(files):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
