"""Makes the manifest of what has just been written."""

from dataclasses import asdict
from importlib.metadata import version

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from vishwamai_mp import __version__
from vishwamai_mp.checkpoint.manifest import FileRecord, Manifest, TensorRecord
from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.runtime import Runtime


def manifest_of(
    config: PretrainConfig, runtime: Runtime, step: int, metadata: Metadata, files: dict[str, FileRecord]
) -> Manifest:
    """The manifest of a checkpoint.

    Args:
        config: resolved.
        runtime: of the ranks that saved it.
        step: optimizer steps done.
        metadata: torch's, of all ranks' tensors.
        files: all of the folder.
    """
    stored, parallel = metadata.state_dict_metadata, config.parallel
    tensors = {
        name: TensorRecord(list(record.size), str(record.properties.dtype).removeprefix("torch."))
        for name, record in sorted(stored.items())
        if isinstance(record, TensorStorageMetadata)
    }
    return Manifest(
        step=step,
        model=asdict(config.model),
        layout={
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size or 1,
            "context_parallel_size": parallel.context_parallel_size,
            "data_parallel_size": runtime.data_parallel_size,
        },
        precision=config.precision,
        versions={
            "vishwamai_mp": __version__,
            "megatron-core": version("megatron-core"),
            "torch": torch.__version__,
        },
        tensors=tensors,
        objects=sorted(stored.keys() - tensors.keys()),
        files=dict(sorted(files.items())),
    )
