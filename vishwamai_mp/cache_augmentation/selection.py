"""Two-step reading: which segments a token reads, where there are more than it may.

The tokens of one document's segment are a block. The block's first token chooses the best `retrieve_segments` of the
segments before it, for all of the block; each token adds the one that is best for itself. Causal, one choice and one
gathering per block, and a token never misses the segment that it asks for most. Where no more segments exist than may
be retrieved, all are, and the result is that of full attention.

A segment's score is a lower bound, by convexity, of the logarithm of what its latents weigh together:
log Σ_l σ_l exp(q·k_l) ≥ log Σ_l σ_l + q·k̄ with k̄ the mean of keys weighted by σ. The choice has no gradient.

Shapes: G rows × heads (local), M blocks of Q queries, N segments of L latents (the null segment, the first, included),
R retrieved, K head width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vishwamai_mp.cache_augmentation.read import Chosen, Latents
from vishwamai_mp.runtime.device import at_once

_SCORES = 2**20  # that a CPU computes at once: 4 MiB


class Summaries(NamedTuple):
    """One vector per segment: mean key (G, N, K), and log of the summed σ(importance) (G, N)."""

    keys: Tensor
    bias: Tensor


@torch.no_grad()
def summarise(latents: Latents) -> Summaries:
    """The summary of each segment. Where log σ is −∞ (places that hold nothing) its bias is −∞ too."""
    share = latents.bias.softmax(-1).nan_to_num()
    keys = (share[..., None, :].to(latents.keys.dtype) @ latents.keys)[..., 0, :]
    return Summaries(keys, latents.bias.logsumexp(-1))


@torch.no_grad()
def choose(q_GMQK: Tensor, summaries: Summaries, hidden_GMN: Tensor, retrieve: int) -> Chosen:
    """Choose segments for blocks whose first query is given.

    Args:
        q_GMQK: queries; where blocks are filled up, the filling comes last.
        summaries: of all segments; the null segment's is not looked at.
        hidden_GMN: segments that a block may not read, the null segment among them.
        retrieve: R.
    """
    size = max(1, at_once(q_GMQK, _SCORES) // (q_GMQK.shape[0] * q_GMQK.shape[2] * hidden_GMN.shape[2]))
    parts = []
    for first in range(0, q_GMQK.shape[1], size):
        part = slice(first, first + size)
        scores = _scores(q_GMQK[:, part], summaries, hidden_GMN[:, part])
        shared = scores[:, :, 0].topk(min(retrieve, scores.shape[3]), sorted=False).indices
        parts.append(_with_own(scores, hidden_GMN[:, part], shared, ~hidden_GMN[:, part].gather(-1, shared)))
    return Chosen(*(torch.cat(pieces, 1) for pieces in zip(*parts, strict=True)))


@torch.no_grad()
def choose_again(q_G1QK: Tensor, summaries: Summaries, shared_GR: Tensor) -> Chosen:
    """The same for later queries of one block, whose first query chose `shared_GR` of the segments: all are visible."""
    hidden = torch.zeros(q_G1QK.shape[0], 1, summaries.bias.shape[1], dtype=torch.bool, device=q_G1QK.device)
    hidden[..., 0] = True
    shared = shared_GR[:, None]
    known = ~hidden.gather(-1, shared)
    return Chosen(*_with_own(_scores(q_G1QK, summaries, hidden), hidden, shared, known))


def _scores(q: Tensor, summaries: Summaries, hidden: Tensor) -> Tensor:
    wide = summaries.bias.dtype
    keys = summaries.keys.to(wide).transpose(-1, -2)
    # One product per group: its blocks see the same summaries.
    scores = (q.flatten(1, 2).to(wide) / math.sqrt(q.shape[-1]) @ keys).unflatten(1, q.shape[1:3])
    return scores.add_(summaries.bias[:, None].masked_fill(hidden, -torch.inf)[:, :, None])


def _with_own(scores: Tensor, hidden: Tensor, shared: Tensor, known: Tensor) -> tuple[Tensor, ...]:
    """Fields of `Chosen`, the null segment in front."""
    own = scores.argmax(-1)
    in_block = torch.zeros_like(hidden).scatter_(-1, shared, known)
    own_known = ~(hidden | in_block).gather(-1, own)
    null = torch.zeros_like(shared[..., :1])
    return torch.cat((null, shared), -1), torch.cat((null == 0, known), -1), own, own_known
