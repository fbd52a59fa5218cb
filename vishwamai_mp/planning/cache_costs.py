"""Parameters, FLOPs and memory of the cache. A test holds these formulae against the built module."""

from vishwamai_mp.config import CacheConfig
from vishwamai_mp.config.component_shapes import IMPORTANCE_WIDTH, cache_heads


def cache_parameters(cache: CacheConfig) -> int:
    """Of all layers that have one.

    Args:
        cache: resolved.
    """
    if not cache.enabled:
        return 0
    width, heads = _width(cache), cache_heads(cache)
    per_head = cache.latents_per_segment * cache.segment_length + IMPORTANCE_WIDTH + 1 + width // heads
    return _modules(cache) * (_matrices(cache) + width + heads * per_head)


def cache_forward_flops_per_token(cache: CacheConfig, sequence_length: int) -> float:
    """Matrix products of one token's forward pass through all caches, a multiply-add counted as two."""
    if not cache.enabled:
        return 0.0
    width, latents = _width(cache), cache.latents_per_segment
    pooling = 2 * latents * (2 * width + IMPORTANCE_WIDTH * cache_heads(cache))
    read, scored = _mean_segments(cache, sequence_length)
    reading = 4 * width * (1 + latents * read) + 2 * width * scored
    return _modules(cache) * (2 * _matrices(cache) + pooling + reading)


def cache_state_bytes(cache: CacheConfig, tokens: int, bytes_per_number: int) -> int:
    """What decoding keeps of one sequence after `tokens` tokens, over all layers and ranks.

    Keys, values and importance (fp32) of latents up to `max_cache_length`; of segments a summary and a count of reads;
    the null segment; of the open segment's tokens what will be pooled. Buffers may have twice that room.
    """
    if not cache.enabled:
        return 0
    width, heads, latents = _width(cache), cache_heads(cache), cache.latents_per_segment
    kept = min(tokens // cache.segment_length, cache.max_cache_length // latents) + 1
    per_segment = latents * (2 * width * bytes_per_number + 4 * heads) + width * bytes_per_number + 8 * heads
    per_open_token = (2 * width + (IMPORTANCE_WIDTH + latents) * heads) * bytes_per_number
    return _modules(cache) * (kept * per_segment + tokens % cache.segment_length * per_open_token)


def _modules(cache: CacheConfig) -> int:
    return len(cache.layers or ())


def _width(cache: CacheConfig) -> int:
    assert cache.hidden_size is not None
    return cache.hidden_size


def _matrices(cache: CacheConfig) -> int:
    """Query, key, value and output projections; importance and pooling of each head."""
    width = _width(cache)
    return 4 * width * width + width * cache_heads(cache) * (IMPORTANCE_WIDTH + cache.latents_per_segment)


def _mean_segments(cache: CacheConfig, length: int) -> tuple[float, float]:
    """Segments that a token reads, and whose summaries it scores, averaged over a row of one document."""
    segment, limit = cache.segment_length, cache.retrieve_segments
    counts = [(segment, before) for before in range(length // segment)]
    counts.append((length % segment, length // segment))
    read = sum(tokens * (before if before <= limit else limit + 1) for tokens, before in counts)
    scored = sum(tokens * before for tokens, before in counts) if length // segment > limit else 0
    return read / length, scored / length
