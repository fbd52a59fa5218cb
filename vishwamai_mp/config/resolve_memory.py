"""Derives and checks the `memory` section."""

import math
from dataclasses import replace

from vishwamai_mp.config.component_shapes import check_component, memory_widths, placed
from vishwamai_mp.config.errors import ConfigError, leave_out
from vishwamai_mp.config.schema import MemoryConfig, PretrainConfig
from vishwamai_mp.config.wording import counted


def resolve_memory(config: PretrainConfig) -> MemoryConfig:
    """Fill in derived values of `config.memory`; where it is enabled, validate it against model and layout.

    Args:
        config: model resolved.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    memory, layers = config.memory, config.model.num_layers
    if not memory.enabled:
        return memory
    memory = replace(
        _with_sizes(memory, config.model.hidden_size),
        hidden_size=config.model.hidden_size if memory.hidden_size is None else memory.hidden_size,
        layers=placed(memory.layers, (min(8, layers) - 1) // 2, layers),
    )
    check_component("memory", memory, config.model.hidden_size, layers)
    _check_shape(memory, config)
    return memory


def _with_sizes(memory: MemoryConfig, width: int) -> MemoryConfig:
    """`memory_size` and `head_dim` from the model's width alone, so that every layout has the same model.

    Heads come in fours, which tensor parallelism can share.

    Args:
        memory: as the user has it.
        width: model.hidden_size.
    """
    size, head_dim = memory.memory_size, memory.head_dim
    if size is None:
        head_dim = head_dim or 2 ** (min(128, max(16, width // 16)).bit_length() - 1)
        size = 4 * head_dim * math.ceil(width / (16 * head_dim))
    elif head_dim is None:
        head_dim = max(16, math.gcd(size, 128))
    return replace(memory, memory_size=size, head_dim=head_dim)


def _check_shape(memory: MemoryConfig, config: PretrainConfig) -> None:
    parallel = config.parallel
    size, head_dim = memory_widths(memory)
    if size % head_dim:
        raise ConfigError(
            f"memory.memory_size={size} is not a multiple of memory.head_dim={head_dim};"
            " it is the width of all heads together: change one of them"
        )
    heads, tensor = size // head_dim, parallel.tensor_model_parallel_size
    made = f"memory.memory_size={size} makes {counted(heads, 'head')} of memory.head_dim={head_dim}"
    if heads % tensor:
        raise ConfigError(
            f"{made}, which parallel.tensor_model_parallel_size={tensor} does not divide;"
            f" use a memory_size that is a multiple of {tensor * head_dim}, or a smaller head_dim"
        )
    context = parallel.context_parallel_size
    if heads // tensor % context:
        raise ConfigError(
            f"{made}, {heads // tensor} on each tensor parallel rank, which parallel.context_parallel_size={context}"
            f" does not divide; use a memory_size that is a multiple of {tensor * context * head_dim},"
            " or a smaller head_dim"
        )
    if memory.loss_weight and memory.num_memory_layers == 1:
        raise ConfigError(
            f"memory.loss_weight={memory.loss_weight} has no effect at memory.num_memory_layers=1: there is no mix of"
            f" levels; {leave_out('memory.loss_weight')}"
        )
