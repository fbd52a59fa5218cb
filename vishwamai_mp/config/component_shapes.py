"""What the components' sections have in common, and the sizes that no setting changes."""

from collections.abc import Sequence

from vishwamai_mp.config.errors import ConfigError, leave_out
from vishwamai_mp.config.schema import CacheConfig, MemoryConfig

CONVOLUTION_TAPS = 4  # of the memory's short convolution, in tokens
IMPORTANCE_WIDTH = 8  # of the cache's importance net, per head
WIDEST_CACHE_HEAD = 512  # that kernels read on GPUs: for wider ones they would spill registers
LONGEST_CACHE_SEGMENT, MOST_CACHE_LATENTS = 64, 16  # that kernels pool on GPUs, tokens and latents: likewise


def memory_widths(memory: MemoryConfig) -> tuple[int, int]:
    """`memory_size` and `head_dim` of a resolved section."""
    assert memory.memory_size is not None
    assert memory.head_dim is not None
    return memory.memory_size, memory.head_dim


def cache_heads(cache: CacheConfig) -> int:
    """`num_heads` of a resolved section."""
    assert cache.num_heads is not None
    return cache.num_heads


def placed(chosen: list[int] | None, first: int, layers: int) -> list[int]:
    """The layers that carry a component: those that were named, else one in eight from `first` on."""
    return list(range(first, layers, 8)) if chosen is None else chosen


def check_component(section: str, component: MemoryConfig | CacheConfig, width: int, layers: int) -> None:
    """Validate what both have.

    Args:
        section: "memory" or "cache".
        component: width and layers filled in.
        width: model.hidden_size.
        layers: model.num_layers.
    """
    if component.hidden_size != width:
        raise ConfigError(
            f"{section}.hidden_size={component.hidden_size} is not model.hidden_size={width}; use {width} or"
            f" {leave_out(f'{section}.hidden_size')}"
        )
    if component.dropout >= 1:
        raise ConfigError(f"{section}.dropout={component.dropout}: a probability; use a number from 0 to below 1")
    _check_layers(section, component.layers or (), layers)


def _check_layers(section: str, chosen: Sequence[int], layers: int) -> None:
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(
            f"{section}.layers={list(chosen)}: name each layer that has a {section} once, or"
            f" {leave_out(f'{section}.layers')}"
        )
    if max(chosen) >= layers:
        raise ConfigError(
            f"{section}.layers={list(chosen)}: model.num_layers={layers}; use numbers from 0 to {layers - 1}"
        )
