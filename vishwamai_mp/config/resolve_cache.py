"""Derives and checks the `cache` section."""

from dataclasses import replace

from vishwamai_mp.config.component_shapes import cache_heads, check_component, placed
from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.config.schema import CacheConfig, PretrainConfig


def resolve_cache(config: PretrainConfig) -> CacheConfig:
    """Fill in derived values of `config.cache`; where it is enabled, validate it against model and layout.

    Args:
        config: model resolved.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    cache, layers = config.cache, config.model.num_layers
    if not cache.enabled:
        return cache
    cache = replace(
        cache,
        num_heads=_heads(config.model.hidden_size) if cache.num_heads is None else cache.num_heads,
        hidden_size=config.model.hidden_size if cache.hidden_size is None else cache.hidden_size,
        layers=placed(cache.layers, min(8, layers) // 2, layers),
    )
    check_component("cache", cache, config.model.hidden_size, layers)
    _check_shape(cache, config)
    _check_sequence(cache, config)
    return cache


def _heads(width: int) -> int:
    """Up to 8, of a width of at least 16 each."""
    return next((heads for heads in (8, 4, 2) if width % heads == 0 and width >= 16 * heads), 1)


def _check_shape(cache: CacheConfig, config: PretrainConfig) -> None:
    heads = cache_heads(cache)
    width, tensor = config.model.hidden_size, config.parallel.tensor_model_parallel_size
    if width % heads:
        raise ConfigError(
            f"cache.num_heads={heads} does not divide model.hidden_size={width}; use a divisor of {width}"
        )
    if heads % tensor:
        raise ConfigError(
            f"cache.num_heads={heads} is not divisible by parallel.tensor_model_parallel_size={tensor};"
            f" use a multiple of {tensor}"
        )
    if cache.max_cache_length < cache.latents_per_segment or cache.max_cache_length % cache.latents_per_segment:
        raise ConfigError(
            f"cache.max_cache_length={cache.max_cache_length} is not a multiple of cache.latents_per_segment="
            f"{cache.latents_per_segment}; segments are kept whole: use a multiple"
        )


def _check_sequence(cache: CacheConfig, config: PretrainConfig) -> None:
    length, segment = config.training.sequence_length, cache.segment_length
    if length < segment:
        raise ConfigError(
            f"training.sequence_length={length} holds no segment of cache.segment_length={segment} tokens, so nothing"
            " would ever be cached; shorten segments"
        )
    if cache.carry_state and length % segment:
        raise ConfigError(
            f"cache.carry_state=true with training.sequence_length={length}: not a multiple of cache.segment_length="
            f"{segment}; change one of them"
        )
    context = config.parallel.context_parallel_size
    most = length // segment + (cache.max_cache_length // cache.latents_per_segment if cache.carry_state else 0)
    if context == 1 or most <= cache.retrieve_segments:
        return
    if config.data.reset_attention_mask:
        raise ConfigError(
            f"data.reset_attention_mask=true with parallel.context_parallel_size={context}: documents' segments lie on"
            f" both sides of ranks' borders; set cache.retrieve_segments to {most} or more"
        )
    if length % (2 * context * segment):
        raise ConfigError(
            f"training.sequence_length={length} is not a multiple of 2 × context_parallel_size {context} ×"
            f" cache.segment_length {segment}; change one, or set cache.retrieve_segments to {most}"
        )
