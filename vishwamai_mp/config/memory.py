"""Derives and checks the `memory` section."""

from dataclasses import replace

from vishwamai_mp.config.components import check_component, placed
from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.config.schema import MemoryConfig, PretrainConfig


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
        memory,
        hidden_size=config.model.hidden_size if memory.hidden_size is None else memory.hidden_size,
        layers=placed(memory.layers, (min(8, layers) - 1) // 2, layers),
    )
    check_component("memory", memory, config.model.hidden_size, layers)
    _check_shape(memory, config)
    return memory


def _check_shape(memory: MemoryConfig, config: PretrainConfig) -> None:
    parallel = config.parallel
    if memory.memory_size % memory.head_dim:
        raise ConfigError(
            f"memory.memory_size={memory.memory_size} is not a multiple of memory.head_dim={memory.head_dim};"
            " it is the width of all heads together: change one of them"
        )
    heads, tensor = memory.memory_size // memory.head_dim, parallel.tensor_model_parallel_size
    made = f"memory.memory_size={memory.memory_size} makes {heads} heads of memory.head_dim={memory.head_dim}"
    if heads % tensor:
        raise ConfigError(
            f"{made}, which parallel.tensor_model_parallel_size={tensor} does not divide;"
            f" use a memory_size that is a multiple of {tensor * memory.head_dim}, or a smaller head_dim"
        )
    context = parallel.context_parallel_size
    if heads // tensor % context:
        raise ConfigError(
            f"{made}, {heads // tensor} on each tensor parallel rank, which parallel.context_parallel_size={context}"
            f" does not divide; use a memory_size that is a multiple of {tensor * context * memory.head_dim},"
            " or a smaller head_dim"
        )
    if memory.loss_weight and memory.num_memory_layers == 1:
        raise ConfigError(
            f"memory.loss_weight={memory.loss_weight} has no effect at memory.num_memory_layers=1: there is no mix of"
            " levels; leave it out"
        )
