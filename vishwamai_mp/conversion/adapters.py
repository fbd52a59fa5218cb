"""Adapters (LoRA) at export: merged into the weights, or as a folder that Hugging Face's `peft` loads.

A fused layer has one A and one B. Its parts, `q_proj` and the like, are rows of its weight, so they are the same rows
of B, and share A. Shapes: I in, O out, R rank of the adapter.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vishwamai_mp.checkpoint.pieces import PieceReader
from vishwamai_mp.config import LoraConfig, UserError
from vishwamai_mp.config.files import write_whole, written_whole
from vishwamai_mp.conversion import dtypes
from vishwamai_mp.conversion.folder import open_folder
from vishwamai_mp.conversion.journal import disk_errors, refuse_used
from vishwamai_mp.conversion.mapping import Mapped
from vishwamai_mp.conversion.rows import RowReader, pieces_of, stored_type
from vishwamai_mp.conversion.source import Source, adapter_names

# What of a model's configuration leaves its weights and what they compute as they are.
_NOT_OF_WEIGHTS = {"max_position_embeddings", "attention_dropout", "hidden_dropout", "initializer_range"}
_ROWS = 4096  # of a product held at a time


def merged(reader: PieceReader, mapped: Mapped, weight: Tensor, lora: LoraConfig) -> Tensor:
    """W + alpha / rank · B A in fp32 of a layer that has an adapter; of any other tensor itself.

    Args:
        reader: of the checkpoint.
        mapped: the tensor.
        weight: its content.
        lora: the run's section.
    """
    names = adapter_names(mapped, lora)
    if not names:
        return weight
    a_RI, b_OR = (_read(reader, name).float() for name in names)
    out = weight.float() if weight.dtype != torch.float32 else weight
    for first in range(0, len(out), _ROWS):
        out[first : first + _ROWS] += b_OR[first : first + _ROWS] @ a_RI * (lora.alpha / lora.rank)
    return out


def export_adapters(source: Source, output: Path, base: str) -> list[str]:
    """Write a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        source: a checkpoint with adapters.
        output: a new or empty folder.
        base: name or path of the Hugging Face model that the adapters were trained on; may be empty.

    Returns:
        what the user should know.

    Raises:
        UserError: no adapters, or components, which `peft` knows nothing of; the folder holds something; `base` is a
            folder with another model than the frozen weights of the checkpoint.
    """
    config = source.config
    if not config.lora.enabled:
        raise UserError(f"{source.path} has no adapters; train with lora.enabled=true, or convert it with to-hf")
    if config.memory.enabled or config.cache.enabled or source.value_head:
        raise UserError(
            f"{source.path} has a memory, cache or value head, which a PEFT folder has no place for; to-hf writes it"
            " whole, adapters merged"
        )
    with disk_errors(output):
        refuse_used(output)
    tensors: dict[str, Tensor] = {}
    with PieceReader(source.path, source.manifest) as reader:
        if Path(base).is_dir() and base:
            _check_base(source, reader, Path(base))
        for mapped in source.mapping:
            if names := adapter_names(mapped, config.lora):
                tensors |= _of_layer(mapped, *(_read(reader, name) for name in names))
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        with written_whole(output / "adapter_model.safetensors") as aside:
            save_file(tensors, aside, metadata={"format": "pt"})
        described = _config(config.lora, [name.split(".")[-3] for name in tensors], base)
        write_whole(output / "adapter_config.json", json.dumps(described, indent=2).encode() + b"\n")
    is_unseen = base and not Path(base).is_dir()
    return (
        [f"--base {base} is no folder here: its weights were not compared with the checkpoint's"] if is_unseen else []
    )


def _check_base(source: Source, reader: PieceReader, base: Path) -> None:
    """Compare all frozen weights with a folder's, rounded to the coarser type of the two."""
    folder = open_folder(base)
    other = f"--base {base} is not the model that the adapters of {source.path} were trained on"
    ours, theirs = asdict(source.config.model), asdict(folder.config.model)
    for key in ours.keys() - _NOT_OF_WEIGHTS:
        if ours[key] != theirs[key]:
            raise UserError(f"{other}: model.{key} is {theirs[key]} there and {ours[key]} here")
    rows = RowReader(folder)
    for mapped in folder.mapping:
        whole, stored = _read(reader, mapped.name), stored_type(folder, mapped)
        kept = dtypes.of_manifest(source.manifest.tensors[mapped.name].dtype, mapped.name)
        dtype = stored if stored.size < kept.size else kept
        for piece in pieces_of(mapped, dtype):
            last = min(piece.last, mapped.shape[0])  # padding of the vocabulary is as each layout needs it
            if not torch.equal(rows.read(piece)[: last - piece.first], whole[piece.first : last].to(dtype.torch)):
                raise UserError(
                    f"{other}: {' or '.join(part.name for part in mapped.parts)} differs; name the one that they were"
                )
    rows.close()


def _read(reader: PieceReader, name: str) -> Tensor:
    size = math.prod(reader.shapes[name]) * reader.dtypes[name].itemsize
    return reader.read(name, torch.empty(size, dtype=torch.uint8))


def _of_layer(mapped: Mapped, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Under peft's names, which are the layers' in the model that it wraps."""
    found = {}
    for part in mapped.parts:
        layer = f"base_model.model.{part.name.removesuffix('.weight')}"
        found[f"{layer}.lora_A.weight"] = a.clone()  # a file holds no tensor twice
        found[f"{layer}.lora_B.weight"] = torch.cat([b[first:last] for first, last in part.rows])
    return found


def _config(lora: LoraConfig, targets: Sequence[str], base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(set(targets)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
