"""Small models for tests, built in the workers."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from tests.training.layouts import SMALL
from vishwamai_mp.config import PretrainConfig, load_config, resolve
from vishwamai_mp.model import VishwamAIModel, build_model
from vishwamai_mp.runtime import Runtime, initialize

Piece = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]  # key, whole shape, offset, data


def small_config(*overrides: str, world_size: int | None = None) -> PretrainConfig:
    """`layouts.SMALL` with overrides, resolved."""
    return resolve(load_config(SMALL, overrides), world_size)


def build(*overrides: str) -> tuple[PretrainConfig, Runtime, list[VishwamAIModel]]:
    """The chunks of this worker's rank, in evaluation mode."""
    config = small_config(*overrides, world_size=dist.get_world_size())
    runtime = initialize(config)
    return config, runtime, [model.eval() for model in build_model(config, runtime)]


def pieces(*overrides: str) -> list[Piece]:
    """Every parameter shard of this rank with its place in the whole; fused matrices come as their parts."""
    _, _, models = build(*overrides)
    found = []
    for model in models:
        for entry in _flat(model.sharded_state_dict()):
            for shard in _flat(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]:
                assert isinstance(shard, ShardedTensor)
                found.append((shard.key, shard.global_shape, shard.global_offset, shard.data.detach().clone()))
    return found


def _flat(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in _flat(item)]
    if isinstance(tree, list):
        return [leaf for item in tree for leaf in _flat(item)]
    return [tree]


def whole_model(ranks: list[list[Piece]], vocab_size: int = SMALL["model"]["vocab_size"]) -> dict[str, Tensor]:
    """The whole parameters from all ranks' pieces, vocabulary padding left out. Replicas must agree bit for bit."""
    whole: dict[str, Tensor] = {}
    for key, shape, offset, data in (piece for rank in ranks for piece in rank):
        target = whole.setdefault(key, torch.full(shape, torch.nan))
        region = target[tuple(slice(first, first + size) for first, size in zip(offset, data.shape, strict=True))]
        assert region.isnan().all() or torch.equal(region, data), f"replicas of {key} differ"
        region.copy_(data)
    for key in whole:
        if "word_embeddings" in key or "output_layer" in key:
            whole[key] = whole[key][:vocab_size]
        assert not whole[key].isnan().any(), f"{key}: a part is missing"
    return whole
