"""Small models in both formats: run folders saved by workers in any layout, and folders that transformers wrote."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from tests.checkpoint import jobs
from tests.training.layouts import SMALL
from vishwamai_mp.checkpoint import CheckpointManager
from vishwamai_mp.config import PretrainConfig, load_config, resolve, to_yaml
from vishwamai_mp.config.resolve_fp8 import SCALING_STATE
from vishwamai_mp.conversion.folder import open_folder
from vishwamai_mp.conversion.from_hf import import_folder
from vishwamai_mp.conversion.source import open_source
from vishwamai_mp.conversion.to_hf import ExportOptions, export_folder
from vishwamai_mp.conversion.verify import Comparison, compare
from vishwamai_mp.model import build_model
from vishwamai_mp.model.initialization import _sharded_tensors
from vishwamai_mp.runtime import initialize, shutdown

CONTEXT = 320
# Segments of 16 tokens, of which 3 are read: a text of 64 tokens has to choose.
MEMORY = "memory={enabled: true, memory_size: 32, head_dim: 8, chunk_size: 16, layers: [0, 2]}"
CACHE = (
    "cache={enabled: true, num_heads: 4, segment_length: 16, latents_per_segment: 2, retrieve_segments: 3,"
    " max_cache_length: 128, layers: [1, 2]}"
)
TP2_PP2_VPP2 = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.virtual_pipeline_model_parallel_size=2",
]


def configure(overrides: list[str], world_size: int | None = None) -> PretrainConfig:
    """4 layers × 32, 8 heads in 4 groups, 250 tokens: the vocabulary is padded in every layout."""
    return resolve(load_config(SMALL, [f"model.max_position_embeddings={CONTEXT}", *overrides]), world_size)


def save_run(run: Path, overrides: list[str], disturbed: bool = True) -> None:
    """In the workers: a run folder with a checkpoint of step 0, weights only. Fresh weights, or `disturbed` ones."""
    config = configure(overrides, dist.get_world_size())
    runtime = initialize(config)
    chunks = build_model(config, runtime)
    for chunk in chunks if disturbed else []:
        for entry in _sharded_tensors(chunk.sharded_state_dict().values()):
            if entry.data.dim() == 1 or entry.key.endswith((".output.weight", "_adapter.b")):
                _disturb(entry)
    if runtime.rank == 0:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(config))
    CheckpointManager(run / "checkpoints", config, runtime).save(0, chunks, None, {})
    shutdown(keep_world=True)


def _disturb(shard: ShardedTensor) -> None:
    """Parameters that all begin as ones or zeros would not tell if they were mixed up. The same in every layout."""
    seed = int.from_bytes(hashlib.sha256(shard.key.encode()).digest()[:6], "little")
    whole = torch.rand(shard.global_shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    for dim, (offset, size) in enumerate(zip(shard.global_offset, shard.data.shape, strict=True)):
        whole = whole.narrow(dim, offset, size)
    shard.data.detach().add_(whole * (1.0 if "norm" in shard.key else 0.3))


def load_and_save(path: Path, run: Path, overrides: list[str]) -> None:
    """In the workers: load a checkpoint in a layout, and save it again."""
    config = configure(overrides, dist.get_world_size())
    runtime = initialize(config)
    chunks = build_model(config, runtime, initialize=False)
    CheckpointManager(path.parent, config, runtime).load(path, chunks)
    CheckpointManager(run / "checkpoints", config, runtime).save(0, chunks, None, {})
    shutdown(keep_world=True)


def step_zero(run: Path) -> Path:
    return run / "checkpoints/step_00000000"


def step_config(run: Path) -> PretrainConfig:
    """A run's configuration, resolved."""
    return resolve(load_config(run / "config.yaml"), 1)


def tensors_of(run: Path, vocab_size: int = SMALL["model"]["vocab_size"]) -> dict[str, torch.Tensor]:
    """Whole parameters of a run's checkpoint, read by torch's own reader; scales of FP8 training are none."""
    found = jobs.tensors_of(step_zero(run), vocab_size)
    return {name: tensor for name, tensor in found.items() if not name.endswith(SCALING_STATE)}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same tensors, bit by bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if left[name].dtype != right[name].dtype or not left[name].equal(right[name])]
    assert not different


def export(run: Path, output: Path, **options: Any) -> None:
    export_folder(open_source(run), output, ExportOptions(**options))


def import_(folder: Path, output: Path, dtype: Any = None) -> list[str]:
    return import_folder(open_folder(folder), output, dtype)


def compare_both(run: Path, folder: Path, prompts: list[list[int]], tokens: int) -> Comparison:
    """In one worker."""
    return compare(open_source(run), folder, prompts, tokens)


def our_greedy(run: Path, prompt: list[int], count: int) -> list[int]:
    """In one worker: the prompt and its continuation, a whole forward pass for every token."""
    tokens = list(prompt)
    with loaded(run) as model:
        for _ in range(count):
            logits = model(torch.tensor([tokens]))[-1, 0, : model.model_config.vocab_size]
            tokens.append(int(logits.argmax()))
    return tokens


def our_logits(run: Path, rows: list[list[int]]) -> torch.Tensor:
    """In one worker: logits (B, T, V) of a run's model."""
    with loaded(run) as model:
        return model(torch.tensor(rows)).transpose(0, 1)[..., : model.model_config.vocab_size].clone()


@contextmanager
def loaded(run: Path) -> Iterator[Any]:
    """A run's model in fp32, on one process, in evaluation."""
    config = resolve(replace(load_config(run / "config.yaml", ["parallel={}"]), precision="fp32"), 1)
    runtime = initialize(config)
    (model,) = build_model(config, runtime, initialize=False)
    CheckpointManager(run / "checkpoints", config, runtime).load(step_zero(run), [model])
    with torch.no_grad():
        yield model.eval()
    shutdown(keep_world=True)


def random_rows(rows: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()
