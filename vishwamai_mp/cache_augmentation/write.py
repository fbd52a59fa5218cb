"""Writing: each completed segment is pooled by learned queries into latents, each with a key, a value, an importance.

    w = softmax_j(p·x_j + position_j),  latent = Σ_j w_j W x_j,  importance = σ(a·silu(latent's importance part) + c)

Projection comes before pooling: the sum is linear, so W x_j pooled is the projection of x pooled, and one
column-parallel product then serves queries, keys, values, importance and pooling alike.

Shapes: T tokens, B rows, H heads (local), L latents of a segment, N segments, S tokens of a segment, K head width,
E width of the importance net.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vishwamai_mp.cache_augmentation.read import Latents, product_dtype
from vishwamai_mp.cache_augmentation.segments import Segments


@dataclass(frozen=True)
class Widths:
    """How one head's projection of a token is laid out: query, key, value, importance, pooling."""

    head: int  # K
    importance: int  # E
    latents: int  # L

    @property
    def content(self) -> int:
        """What is pooled: key, value and the importance net's input."""
        return 2 * self.head + self.importance

    @property
    def total(self) -> int:
        return self.head + self.content + self.latents

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Last dimension → query, content, pooling."""
        return x.split((self.head, self.content, self.latents), -1)


def initial_positions(latents: int, length: int) -> Tensor:
    """(L, S) what each place of a segment adds to each latent's pooling scores before anything is learned.

    Latents share the segment out: each has a Gaussian window around its own part. Were all alike, they would write the
    same mean of all tokens, and the gradients that tell them apart would be small.
    """
    width = length / latents
    centre = (torch.arange(latents)[:, None] + 0.5) * width - 0.5
    return -0.5 * ((torch.arange(length) - centre) / (width / 2)).square()


def pool(content: Tensor, scores: Tensor, position_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Pool segments.

    Args:
        content: (B, N, S, H, C).
        scores: (B, N, S, H, L), p·x.
        position_bias: (H, L, S).

    Returns:
        (B, H, N, L, C), and the logarithms of the softmax's denominators (B, H, N, L) in fp32 or fp64.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    logits = scores.to(wide).permute(0, 3, 1, 4, 2) + position_bias.to(wide)[:, None]
    normaliser = logits.logsumexp(-1)
    weights = (logits - normaliser[..., None]).exp()
    content = content.permute(0, 3, 1, 2, 4)
    dtype = product_dtype(content.dtype)
    pooled = weights.flatten(0, 2).to(dtype) @ content.flatten(0, 2).to(dtype)
    return pooled.unflatten(0, content.shape[:3]).to(content.dtype), normaliser


def pool_whole_rows(content: Tensor, scores: Tensor, position_bias: Tensor, segments: Segments) -> Tensor:
    """Pool all segments of whole rows.

    Args:
        content: (T, B, H, C).
        scores: (T, B, H, L).
        position_bias: (H, L, S).
        segments: of these rows.

    Returns:
        (B, H, N, L, C). What an empty place holds is arbitrary, but finite.
    """
    return pool(cut_into_segments(content, segments), cut_into_segments(scores, segments), position_bias)[0]


def cut_into_segments(x: Tensor, segments: Segments) -> Tensor:
    """(T, B, …) → (B, N, S, …)."""
    count = segments.last.shape[1]
    if segments.within is None:
        return x[: count * segments.length].unflatten(0, (count, segments.length)).movedim(2, 0)
    inside = torch.arange(segments.length, device=x.device)
    position = (segments.last[..., None] - (segments.length - 1) + inside).clamp(0, x.shape[0] - 1)
    row = torch.arange(x.shape[1], device=x.device)[:, None, None]
    return x[position, row]


def latents_of(pooled: Tensor, importance_weight: Tensor, importance_bias: Tensor, head_width: int) -> Latents:
    """Keys, values and importance of pooled content.

    Args:
        pooled: (B, H, N, L, C).
        importance_weight: (H, E), a.
        importance_bias: (H,), c.
        head_width: K.

    Returns:
        latents with rows and heads made one dimension: (B·H, N, L, …).
    """
    keys, values, hidden = pooled.split((head_width, head_width, importance_weight.shape[1]), -1)
    wide = torch.promote_types(pooled.dtype, torch.float32)
    logit = (F.silu(hidden.to(wide)) * importance_weight.to(wide)[:, None, None]).sum(-1)
    bias = F.logsigmoid(logit + importance_bias.to(wide)[:, None, None])
    return Latents(*(x.flatten(0, 1) for x in (keys, values, bias)))
