"""Context parallelism: each rank pools its own tokens and gathers latents, an eighth of keys and values.

The row is cut into 2·R chunks for R ranks, two of them on each (`runtime.zigzag.local_positions`). A segment that lies
on both sides of a cut is pooled in parts, and the parts are joined by their softmax denominators.

Shapes: C tokens on this rank, P segments that touch a chunk, H heads (local), L latents, N segments of the row, W width
of what is pooled.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from vishwamai_mp.cache_augmentation.segments import Segments
from vishwamai_mp.cache_augmentation.write import pool

_ABSENT = -1e9  # score of a token that is not there: no weight beside any that is, and finite where none is


def chunk_starts(local_tokens: int, group: Any) -> list[int]:
    """Where this rank's contiguous chunks begin in the row, in the order it holds them."""
    rank, size = group.rank(), group.size()
    return [0] if size == 1 else _chunk_starts(local_tokens, rank, size)


def _chunk_starts(local_tokens: int, rank: int, size: int) -> list[int]:
    return [place * (local_tokens // 2) for place in (rank, 2 * size - 1 - rank)]


def gather_pooled(content: Tensor, scores: Tensor, position_bias: Tensor, segments: Segments, group: Any) -> Tensor:
    """Pool this rank's tokens and join all ranks' parts.

    Args:
        content: (C, B, H, W), this rank's two chunks.
        scores: (C, B, H, L).
        position_bias: (H, L, S).
        segments: of whole rows.
        group: context parallel.

    Returns:
        (B, H, N, L, W), the same on all ranks.
    """
    tokens, rows = content.shape[:2]
    chunk = tokens // 2
    parts = []
    for half, start in zip(range(2), chunk_starts(tokens, group), strict=True):
        own = slice(half * chunk, (half + 1) * chunk)
        parts.append(_pool_chunk(content[own], scores[own], position_bias, segments, start))
    # (2 · size · B, H, P, L, W + 2), rank after rank, of each its first chunk and then its second
    gathered = gather_from_sequence_parallel_region(torch.cat(parts), group=group)
    owners = [start for rank in range(group.size()) for start in _chunk_starts(tokens, rank, group.size())]
    return _join(gathered.unflatten(0, (-1, rows)), owners, chunk, segments)


def _touching(segments: Segments, start: int, chunk: int) -> Tensor:
    """(B, P) the segments that may have tokens in a chunk, in order; those behind the last stand for none."""
    first = (segments.last < start).sum(1, keepdim=True)
    return first + torch.arange(chunk // segments.length + 2, device=first.device)


def _pool_chunk(content: Tensor, scores: Tensor, position_bias: Tensor, segments: Segments, start: int) -> Tensor:
    """What one chunk adds to the segments that touch it: pooled and log denominator, (B, H, P, L, W + 2)."""
    chunk, rows = content.shape[:2]
    touching = _touching(segments, start, chunk)
    padded = torch.nn.functional.pad(segments.last.expand(rows, -1), (0, touching.shape[1] + 1), value=-1)
    last = padded.gather(1, touching.expand(rows, -1).clamp(max=padded.shape[1] - 1))
    inside = torch.arange(1 - segments.length, 1, device=last.device)
    position = last[..., None] + inside - start
    here = (position >= 0) & (position < chunk) & (last[..., None] >= 0)
    row = torch.arange(rows, device=last.device)[:, None, None]
    position = position.clamp(0, chunk - 1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    taken = scores[position, row].to(wide).masked_fill(~here[..., None, None], _ABSENT)
    pooled, normaliser = pool(content[position, row], taken, position_bias)
    # Two numbers of the dtype that travels hold what one is too coarse for.
    coarse = normaliser.to(pooled.dtype)
    fine = (normaliser - coarse).to(pooled.dtype)
    return torch.cat((pooled, coarse[..., None], fine[..., None]), -1)


def _join(parts: Tensor, starts: list[int], chunk: int, segments: Segments) -> Tensor:
    """Parts (2·size, B, H, P, L, W + 2) of chunks that begin at `starts` → (B, H, N, L, W)."""
    _, rows, heads, _, latents, width = parts.shape
    count = segments.last.shape[1]
    index = torch.cat([_touching(segments, start, chunk).expand(rows, -1) for start in starts], 1).clamp(max=count)
    flat = parts.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)  # (B, H, all parts, L, W + 2)
    pooled = flat[..., :-2]
    normaliser = flat[..., -2:].to(torch.promote_types(flat.dtype, torch.float32)).sum(-1)
    place = index[:, None, :, None].expand(-1, heads, -1, latents)
    top = normaliser.new_full((rows, heads, count + 1, latents), torch.finfo(normaliser.dtype).min)
    top = top.scatter_reduce(2, place, normaliser.detach(), "amax")
    share = (normaliser - top.gather(2, place)).exp()
    total = torch.zeros_like(top).scatter_add(2, place, share)
    joined = pooled.new_zeros(rows, heads, count + 1, latents, width - 2, dtype=share.dtype)
    joined = joined.scatter_add(2, place[..., None].expand_as(pooled), share[..., None] * pooled)
    joined = joined / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None]
    return joined[:, :, :count].to(pooled.dtype)
