"""Decoding: the cache's state after some tokens, and reading and writing that continue it.

The state is an immutable value. A fork keeps a reference; what both have in common is in memory once.

Shapes: T new tokens, B rows (of one length), H heads (local), G = B·H, K head width, n segments of L latents (the null
segment, the first, included), S tokens of a segment, W width of what is pooled, R segments chosen.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vishwamai_mp.cache_augmentation.eviction import survivors, take, worth
from vishwamai_mp.cache_augmentation.read import Chosen, Everything, Latents, read, with_null
from vishwamai_mp.cache_augmentation.selection import Summaries, choose, choose_again, summarise
from vishwamai_mp.cache_augmentation.shared_list import SharedList
from vishwamai_mp.cache_augmentation.write import latents_of, pool
from vishwamai_mp.config import CacheConfig


@dataclass(frozen=True)
class CacheState:
    """What the cache holds after some tokens.

    Attributes:
        written: latents and summaries of the null segment and closed ones: keys, values, bias, summary keys and bias.
        access: (G, n) weight that all queries so far gave each segment.
        content: (t, B, H, W) of the open segment's tokens.
        scores: (t, B, H, L) of the same.
        chosen: (G, R) segments that the open segment's first token chose; None where all are read.
    """

    written: SharedList
    access: Tensor
    content: Tensor
    scores: Tensor
    chosen: Tensor | None = None

    @property
    def segments(self) -> int:
        """Segments held, of each head."""
        return self.written.length - 1

    @property
    def latents(self) -> Latents:
        return Latents(*self.written.tensors[:3])

    @property
    def summaries(self) -> Summaries:
        return Summaries(*self.written.tensors[3:])


@dataclass(frozen=True)
class Decoder:
    """Continues a state. The tensors are the module's parameters, by head."""

    config: CacheConfig
    position_bias: Tensor  # (H, L, S)
    importance_weight: Tensor  # (H, E)
    importance_bias: Tensor  # (H,)
    null: Tensor  # (H, K)

    def empty(self, query: Tensor, content: Tensor, scores: Tensor) -> CacheState:
        """The state before anything was read; arguments as of `start` say sizes and dtype."""
        keys = query.new_empty(query.shape[1] * query.shape[2], 0, scores.shape[3], query.shape[3])
        nothing = Latents(keys, keys, keys[..., 0].to(torch.promote_types(keys.dtype, torch.float32)))
        held = with_null(nothing, self.null.repeat(query.shape[1], 1))
        return CacheState(_list(held), torch.zeros_like(held.bias[..., 0]), content[:0].detach(), scores[:0].detach())

    @torch.no_grad()
    def start(self, held: Latents, mass_GN: Tensor, query: Tensor, content: Tensor, scores: Tensor) -> CacheState:
        """The state after whole rows that were read as in training.

        Args:
            held: latents of the null segment and all closed ones.
            mass_GN: weight that the rows' queries gave them.
            query: (T, B, H, K).
            content: (T, B, H, W).
            scores: (T, B, H, L).
        """
        closed = query.shape[0] // self.config.segment_length * self.config.segment_length
        state = CacheState(_list(held), mass_GN, content[closed:].detach(), scores[closed:].detach())
        if closed < query.shape[0] and state.segments > self.config.retrieve_segments:
            first = query[closed : closed + 1].permute(1, 2, 0, 3).flatten(0, 1)[:, None]
            state = replace(state, chosen=self._choose(first, state).segments[:, 0, 1:])
        return self._evict(state)

    @torch.no_grad()
    def advance(self, query: Tensor, content: Tensor, scores: Tensor, state: CacheState) -> tuple[Tensor, CacheState]:
        """Read for new tokens, (T, B, H, K), and write the segments that they close.

        Args:
            query: (T, B, H, K).
            content: (T, B, H, W).
            scores: (T, B, H, L).
            state: after the tokens before.
        """
        out = torch.empty_like(query)
        first = 0
        while first < query.shape[0]:
            piece = slice(first, first + self.config.segment_length - state.content.shape[0])
            out[piece], state = self._read(query[piece], state)
            state = self._append(content[piece], scores[piece], state)
            first = piece.stop
        return out, state

    def _read(self, query: Tensor, state: CacheState) -> tuple[Tensor, CacheState]:
        """Tokens of the open segment, (t, B, H, K)."""
        _, rows, heads, _ = query.shape
        q = query.permute(1, 2, 0, 3).flatten(0, 1)[:, None]
        if state.segments > self.config.retrieve_segments:
            chosen = self._choose(q, state)
            plan: Chosen | Everything = chosen
            state = replace(state, chosen=chosen.segments[:, 0, 1:])
        else:
            since = torch.zeros(q.shape[0], 1, state.written.length, dtype=torch.long, device=q.device)
            plan = Everything(since, since + query.shape[0], (state.written.length,))
        found = read(q, state.latents, plan, torch.ones(q.shape[:3], dtype=torch.bool, device=q.device))
        assert found.mass is not None
        out = found.out[:, 0].unflatten(0, (rows, heads)).permute(2, 0, 1, 3)
        return out, replace(state, access=state.access + found.mass)

    def _choose(self, q_G1TK: Tensor, state: CacheState) -> Chosen:
        if state.chosen is not None:
            return choose_again(q_G1TK, state.summaries, state.chosen)
        hidden = torch.zeros(q_G1TK.shape[0], 1, state.written.length, dtype=torch.bool, device=q_G1TK.device)
        hidden[..., 0] = True
        return choose(q_G1TK, state.summaries, hidden, self.config.retrieve_segments)

    def _append(self, content: Tensor, scores: Tensor, state: CacheState) -> CacheState:
        content, scores = torch.cat((state.content, content)), torch.cat((state.scores, scores))
        if content.shape[0] < self.config.segment_length:
            return replace(state, content=content, scores=scores)
        whole = content.movedim(0, 1)[:, None], scores.movedim(0, 1)[:, None]
        pooled, _ = pool(*whole, self.position_bias)
        latents = latents_of(pooled, self.importance_weight, self.importance_bias, self.null.shape[1])
        written = state.written.append([*latents, *summarise(latents)])
        return self._evict(CacheState(written, F.pad(state.access, (0, 1)), content[:0], scores[:0]))

    def _evict(self, state: CacheState) -> CacheState:
        """Make room where there is too much, a sixteenth at a time: what stays is copied."""
        capacity = self.config.max_cache_length // self.config.latents_per_segment
        if state.segments <= capacity:
            return state
        value = worth(state.latents.bias, state.access)
        value[:, 0] = torch.inf  # the null segment
        stay = survivors(value, 1 + capacity - capacity // 16)
        written = SharedList([take(tensor, stay) for tensor in state.written.tensors])
        # Places changed: where a segment is open, its next token chooses anew.
        return replace(state, written=written, access=take(state.access, stay), chosen=None)


def _list(held: Latents) -> SharedList:
    return SharedList([*held, *summarise(held)])
