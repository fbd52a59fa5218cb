"""Latent deliberation (arXiv 2412.17747): a frozen model is given latents to think with, at sampled positions of a row.

After a position p come n latents, then the tokens that really follow; the loss is that of the next `ahead` tokens. All
positions of a row are trained in one forward pass: the row itself, and behind it for each position a branch of latents
and copies of tokens, which by the mask sees the row up to p and itself. What makes latents is trained, the model not.

The control arm are pause tokens (arXiv 2310.02226): the same slots, filled with learned vectors that know nothing of
the row.

Shapes: B rows, T tokens, D width, P positions, n latents of each, A tokens ahead, E = T + P·(n + A − 1) slots.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where things stand in an extended row.

    Attributes:
        copied: (P, A − 1) positions of the tokens that are copied into each branch.
        places: (E,) each slot's position for rotary embeddings: a branch goes on behind its p.
        allowed: (E, E) True where a slot may attend to another.
        predicting: (P, A) slots whose next token counts.
        targets: (P, A) positions of those next tokens.
    """

    copied: Tensor
    places: Tensor
    allowed: Tensor
    predicting: Tensor
    targets: Tensor


def lay_out(tokens: int, positions: Tensor, latents: int, ahead: int, window: int | None = None) -> Layout:
    """Plan branches of `latents` latents after `positions`, (P,), the largest below T − `ahead`.

    Args:
        tokens: T.
        positions: after which the model deliberates.
        latents: n.
        ahead: A.
        window: slots that a slot sees up to and including itself, counted by places; None: all.
    """
    assert int(positions.max()) + ahead < tokens
    size, device = latents + ahead - 1, positions.device
    row, inside = torch.arange(tokens, device=device), torch.arange(size, device=device)
    places = torch.cat((row, (positions[:, None] + 1 + inside).flatten()))
    branch = torch.cat((torch.full_like(row, -1), torch.arange(len(positions), device=device).repeat_interleave(size)))
    until = torch.cat((row, positions.repeat_interleave(size)))  # how much of the row each slot sees
    to_row = (branch == -1)[None] & (places <= until[:, None])
    to_own = (branch[:, None] == branch) & (branch != -1)[None] & (places[:, None] >= places)
    allowed = to_row | to_own
    if window is not None:
        allowed &= places[:, None] - places < window
    ahead_by = torch.arange(ahead, device=device)
    first = tokens + size * torch.arange(len(positions), device=device)[:, None] + latents - 1
    targets = positions[:, None] + 1 + ahead_by
    return Layout(targets[:, :-1], places, allowed, first + ahead_by, targets)


class Deliberator(nn.Module):
    """Makes n latents after a position from the frozen model's hidden states up to it.

    n learned queries, moved by the hidden state at the position, attend to the row; a net of two layers makes
    embeddings of what they read. Keys and values are of a token and the one before it.
    """

    def __init__(self, width: int, latents: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.slots = nn.Parameter(0.02 * torch.randn(latents, width))
        self.norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(2 * width, 2 * width, bias=False)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_TBD: Tensor, positions: Tensor) -> Tensor:
        """(P, n, B, D)."""
        x = self.norm(hidden_TBD)
        pairs = torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:-1], x), -1)
        key, value = self.key_value(pairs).permute(1, 0, 2).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query = self.query(x[positions])[:, None] + self.slots[:, None]  # (P, n, B, D)
        slots = query.permute(2, 0, 1, 3).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        seen = torch.arange(x.shape[0], device=x.device) <= positions[:, None]
        mask = seen.repeat_interleave(len(self.slots), 0)
        read = F.scaled_dot_product_attention(slots, key, value, attn_mask=mask)
        read = read.transpose(1, 2).flatten(2).unflatten(1, (len(positions), -1)).permute(1, 2, 0, 3)
        return read + self.outer(F.silu(self.inner(read)))


class PauseTokens(nn.Module):
    """The control: learned vectors in the same slots, the same after every position of every row."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(0.02 * torch.randn(latents, width))

    def forward(self, hidden_TBD: Tensor, positions: Tensor) -> Tensor:
        """(P, n, B, D)."""
        return self.slots[None, :, None].expand(len(positions), -1, hidden_TBD.shape[1], -1)


def deliberate(
    model: Any, thinker: nn.Module, tokens: Tensor, positions: Tensor, ahead: int, window: int | None = None
) -> Tensor:
    """Logits of the next `ahead` tokens after each position, (P, A, B, V), with latents in between.

    Args:
        model: a `VishwamAIModel` of one stage, without components that read the row's order; frozen.
        thinker: makes latents, (P, n, B, D), of hidden states (T, B, D) and positions.
        tokens: (B, T).
        positions: (P,) the same in all rows.
        ahead: A.
        window: the model's.
    """
    length = tokens.shape[1]
    with torch.no_grad():
        embedded = model.embed(tokens)
        row = torch.arange(length, device=tokens.device)
        plain = (row[:, None] >= row) & (row[:, None] - row < (window or length))
        hidden = model.decoder(embedded, plain[None, None], rotary_pos_emb=model.rotary(row, length))
    latents = thinker(hidden, positions)
    layout = lay_out(length, positions, latents.shape[1], ahead, window)
    branches = torch.cat((latents, embedded[layout.copied]), 1)  # (P, n + A − 1, B, D)
    extended = torch.cat((embedded, branches.flatten(0, 1)))
    out = model.decoder(extended, layout.allowed[None, None], rotary_pos_emb=model.rotary(layout.places, length))
    logits, _ = model.output_layer(out[layout.predicting.flatten()])
    return logits.unflatten(0, layout.predicting.shape)
