"""What memory and cache keep of a forward pass, and on which stages they stand. Measured against the simulated peak.

Heads are split over tensor and context parallel ranks; norm and output are as wide as the residual stream. The
coefficients are bytes per token in 16 bits (twice that in fp32), read off simulated steps of several widths, heads,
levels, latents and segments, with kernels and with torch's operators. The memory's kernels keep projections, what the
convolution made of them, gates, writes and what was read; the cache's, where they do all in between, projections,
latents, the choice and what was read.
"""

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.config.component_shapes import (
    LONGEST_CACHE_SEGMENT,
    MOST_CACHE_LATENTS,
    WIDEST_CACHE_HEAD,
    cache_heads,
)
from vishwamai_mp.planning.neural_memory_costs import heads as memory_heads


def component_activations(config: PretrainConfig, section: str, on_gpu: bool) -> float:
    """Bytes per token of this rank that one memory or one cache keeps.

    Args:
        config: resolved.
        section: "memory" or "cache".
        on_gpu: kernels compute what they can; on CPUs torch's operators do.
    """
    parallel = config.parallel
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    # What the norm made and what is added; on GPUs a byte of dropout's mask and the norm's scale; on CPUs 2 bytes more.
    dropout = (config.memory if section == "memory" else config.cache).dropout > 0
    kept = (4 + dropout if on_gpu else 6) * config.model.hidden_size / shards + (4 if on_gpu else 0)
    split = _memory(config, on_gpu) if section == "memory" else _cache(config, on_gpu)
    return (kept + split / parallel.tensor_model_parallel_size) * (2 if config.precision == "fp32" else 1)


def _memory(config: PretrainConfig, on_gpu: bool) -> float:
    memory = config.memory
    heads, levels = memory_heads(memory), memory.num_memory_layers
    assert memory.memory_size is not None
    if on_gpu:
        per_level: float = 18 * memory.memory_size + (18 if memory.momentum else 16) * heads
        return levels * per_level + 4 * memory.memory_size
    per_level = 22.1 * memory.memory_size + (72 * heads if memory.momentum else 0)
    return levels * per_level + 6.7 * memory.memory_size + 14 * heads


def _cache(config: PretrainConfig, on_gpu: bool) -> float:
    cache = config.cache
    assert cache.hidden_size is not None
    latents, share = cache.latents_per_segment, cache.latents_per_segment / cache.segment_length
    heads = cache_heads(cache)
    width, length = cache.hidden_size, cache.segment_length
    reads = on_gpu and width // heads <= WIDEST_CACHE_HEAD
    whole = config.parallel.context_parallel_size == 1 and not cache.carry_state
    if reads and whole and length <= LONGEST_CACHE_SEGMENT and latents <= MOST_CACHE_LATENTS:
        chooses = config.training.sequence_length // length > cache.retrieve_segments
        choice = 5 + 5 * (1 + cache.retrieve_segments) / length if chooses else 0
        return width * (8 + 4 * share) + heads * (20 + 2 * latents + 4 * share + choice)
    kept = width * (8.06 + 4 * share) + heads * (12 + 10.4 * latents + 84 * share)
    return kept + (2 * width + 4 * heads if reads else 0)


def components_on_stage(
    config: PretrainConfig, layers: list[int] | None, per_stage: list[int], stage: int, first: int | None = None
) -> float:
    """How many of the layers that carry a component stand on a stage.

    Args:
        layers: that carry one, from 0.
        per_stage: layers on each stage.
        first: count only among so many layers of each chunk; None: among all.
    """
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    each = per_stage[stage] // chunks
    counted = each if first is None else min(first, each)
    if chunks > 1 and len(set(per_stage)) > 1:
        return len(layers or ()) * counted * chunks / sum(per_stage)
    own: set[int] = set()
    for chunk in range(chunks):
        before = chunk * sum(per_stage) // chunks
        begin = before + sum(per_stage[:stage]) // chunks
        own |= set(range(begin, begin + counted))
    return len(own & set(layers or ()))
