"""Initial parameters that do not depend on the layout: a function of (seed, parameter's global name, row).

Each row of each matrix has its own generator, seeded by a hash of those three, and a rank draws the rows it holds.
So one process, eight tensor parallel ranks and eight pipeline stages start from the same model, bit for bit.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from vishwamai_mp.config import ModelConfig
from vishwamai_mp.model.model import VishwamAIModel

# Parameters whose values are drawn; all others keep the constants that their modules gave them (norms: ones).
# Outputs into the residual stream are scaled down with depth (GPT-2's rule).
_DRAWN = re.compile(
    r"(word_embeddings|output_layer|linear_qkv|linear_fc1|memory\.projection|cache\.projection)\.weight$"
)
_DRAWN_RESIDUAL = re.compile(r"(linear_proj|linear_fc2)\.weight$")
_ADAPTER = re.compile(r"_adapter\.a$")  # its output is about as large as its input
_OF_COMPONENT = re.compile(r"(?:decoder\.layers\.\d+\.)?(memory|cache|value_head)\.(.+)")


@torch.no_grad()
def initialize_parameters(model: VishwamAIModel, config: ModelConfig, seed: int) -> None:
    """Fill in the parameters of one stage or chunk, whatever its shard of the whole."""
    for shard in _sharded_tensors(model.sharded_state_dict().values()):
        if _DRAWN.search(shard.key):
            _fill(shard, config.initializer_range, seed)
        elif _DRAWN_RESIDUAL.search(shard.key):
            _fill(shard, config.initializer_range / math.sqrt(2 * config.num_layers), seed)
        elif shard.key.endswith("linear_qkv.bias"):
            shard.data.zero_()  # megatron-core leaves it undefined where initialisation is ours
        elif _ADAPTER.search(shard.key):
            _fill(shard, 1 / math.sqrt(shard.global_shape[1]), seed)


@torch.no_grad()
def copy_components(model: VishwamAIModel, components: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Start the components of one stage or chunk, in every layer that carries them, from given parameters.

    Args:
        model: whose configuration is that of the components.
        components: whole tensors, by component (`memory`, `cache`, `value_head`) and name.
    """
    for shard in _sharded_tensors(model.sharded_state_dict().values()):
        found = _OF_COMPONENT.fullmatch(shard.key)
        if found and found[1] in components:
            whole = components[found[1]][found[2]]
            assert tuple(whole.shape) == tuple(shard.global_shape), shard.key
            rows = zip(shard.global_offset, shard.data.shape, strict=True)
            shard.data.copy_(whole[tuple(slice(first, first + count) for first, count in rows)])


def _sharded_tensors(entries: Iterable[Any]) -> Iterable[ShardedTensor]:
    for entry in entries:
        if isinstance(entry, ShardedTensorFactory):  # a fused matrix: its parts are views of it
            yield from _sharded_tensors(_leaves(entry.build()))
        elif isinstance(entry, ShardedTensor):
            yield entry


def _leaves(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(item)
    else:
        yield tree


def _fill(shard: ShardedTensor, std: float, seed: int) -> None:
    """Draw the rows of a matrix shard from normal(0, std²)."""
    first_row, first_column = shard.global_offset
    data: Tensor = shard.data
    generator = torch.Generator(device=data.device)
    row = torch.empty(shard.global_shape[1], device=data.device)
    for index in range(data.shape[0]):
        digest = hashlib.blake2b(f"{seed}/{shard.key}/{first_row + index}".encode(), digest_size=7).digest()
        generator.manual_seed(int.from_bytes(digest, "little"))
        row.normal_(0.0, std, generator=generator)
        data[index].copy_(row[first_column : first_column + data.shape[1]])
