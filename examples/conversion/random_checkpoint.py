#!/usr/bin/env python3
"""Writes a run folder with a checkpoint of random weights, laid out as training at TP4·PP2 lays it out.

    python examples/conversion/random_checkpoint.py --output /tmp/big/run --size full     # 10.5 B parameters, 21 GB

No model is built: pieces are drawn and written one by one, so a checkpoint larger than memory is no matter.
"""

import argparse
import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from vishwamai_mp.checkpoint.manifest import NAME, FileRecord, Manifest, TensorRecord, record_of
from vishwamai_mp.checkpoint.store import publish
from vishwamai_mp.checkpoint.writer import ChecksummedFile
from vishwamai_mp.config import PretrainConfig, load_config, padded_vocab_size, resolve, to_yaml
from vishwamai_mp.config.files import write_through
from vishwamai_mp.conversion.mapping import Mapped, plain_mapping

TENSOR, STAGES, FILES_PER_RANK = 4, 2, 2
_LAYOUT = {"tensor_model_parallel_size": TENSOR, "pipeline_model_parallel_size": STAGES}
SIZES = {
    "full": {
        "hidden_size": 5120,
        "num_layers": 36,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 13824,
        "vocab_size": 64000,
        "max_position_embeddings": 8192,
    },
    "smoke": {
        "hidden_size": 256,
        "num_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 704,
        "vocab_size": 3001,
        "max_position_embeddings": 512,
    },
}
_POOL = 1 << 25  # random numbers drawn once; tensors are cuts of it
Place = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes of a piece


def settings(size: str) -> PretrainConfig:
    """The resolved configuration of a size."""
    tree = {"model": SIZES[size], "parallel": _LAYOUT, "precision": "bf16", "training": {"sequence_length": 512}}
    return resolve(load_config(tree))


def pieces(mapped: Mapped, rank: int, rows: int) -> Iterator[Place]:
    """What of a tensor a tensor-parallel rank holds. `rows`: of the whole, padding included."""
    width = mapped.shape[1:]
    if not width:  # norms: all ranks hold them, the first saves them
        if rank == 0:
            yield (0,), (rows,)
    elif mapped.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        share = width[0] // TENSOR
        yield (0, rank * share), (rows, share)
    elif mapped.name.endswith("linear_fc1.weight"):  # a share of the gate and one of the up projection
        share = rows // 2 // TENSOR
        for half in range(2):
            yield (half * rows // 2 + rank * share, 0), (share, *width)
    else:
        share = rows // TENSOR
        yield (rank * share, 0), (share, *width)


def write(run: Path, size: str) -> None:
    """Write the run folder."""
    config = settings(size)
    partial = run / "checkpoints" / "step_00000000.00000000.partial"
    partial.mkdir(parents=True)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    records: dict[str, FileRecord] = {}
    for rank in range(TENSOR * STAGES):
        mine = list(_held(config, stage=rank // TENSOR))
        for number in range(FILES_PER_RANK):
            name = f"__{rank}_{number}.distcp"
            with (partial / name).open("wb") as raw:
                file = ChecksummedFile(raw)
                for mapped in mine[number::FILES_PER_RANK]:
                    rows = padded_vocab_size(config) if mapped.is_vocabulary else mapped.shape[0]
                    record = tensors.setdefault(
                        mapped.name,
                        TensorStorageMetadata(
                            TensorProperties(dtype=torch.bfloat16), torch.Size((rows, *mapped.shape[1:])), []
                        ),
                    )
                    for offsets, sizes in pieces(mapped, rank % TENSOR, rows):
                        start = file.size
                        file.save(_draw(pool, sizes, seed=len(places)))
                        index = MetadataIndex(mapped.name, torch.Size(offsets), len(record.chunks))
                        places[index] = _StorageInfo(name, start, file.size - start)
                        record.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                raw.flush()
                os.fsync(raw.fileno())
            records[name] = FileRecord(file.size, file.crc32)
    write_through(partial / ".metadata", pickle.dumps(Metadata({**tensors}, storage_data=places)))
    _complete(run, partial, config, tensors, records)


def _held(config: PretrainConfig, stage: int) -> Iterator[Mapped]:
    """The tensors of a pipeline stage."""
    per_stage = config.model.num_layers // STAGES
    for mapped in plain_mapping(config.model):
        parts = mapped.name.split(".")
        layer = (
            int(parts[2]) if parts[1] == "layers" else (0 if parts[0] == "embedding" else config.model.num_layers - 1)
        )
        if layer // per_stage == stage:
            yield mapped


def _draw(pool: torch.Tensor, sizes: tuple[int, ...], seed: int) -> torch.Tensor:
    count = torch.Size(sizes).numel()
    first = seed * 7919 % (_POOL // 2)
    repeats = -(-(first + count) // _POOL)
    return pool.repeat(repeats)[first : first + count].view(sizes).clone()


def _complete(
    run: Path,
    partial: Path,
    config: PretrainConfig,
    tensors: dict[str, TensorStorageMetadata],
    records: dict[str, FileRecord],
) -> None:
    torch.save({}, partial / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(partial))
    write_through(partial / "trainer.json", json.dumps({"optimizer": [], "trainer": {}}).encode())
    records |= {path.name: record_of(path) for path in partial.iterdir() if path.name not in records}
    manifest = Manifest(
        step=0,
        model=asdict(config.model),
        layout={
            **_LAYOUT,
            "virtual_pipeline_model_parallel_size": 1,
            "context_parallel_size": 1,
            "data_parallel_size": 1,
        },
        precision=config.precision,
        versions={},
        tensors={name: TensorRecord(list(record.size), "bfloat16") for name, record in sorted(tensors.items())},
        objects=[],
        files=records,
    )
    write_through(partial / NAME, manifest.to_json().encode())
    publish(partial, 0)
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new run folder")
    parser.add_argument("--size", choices=SIZES, default="smoke")
    options = parser.parse_args()
    write(options.output, options.size)
