"""Reading by a contiguous chunk of a training row: from tokens to blocks of queries and back.

Shapes: B rows, C tokens of the chunk, H heads (local), G = B·H, M blocks of Q queries, K head width, N segments: the
null segment, those carried from before the row, those of the row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vishwamai_mp.cache_augmentation.read import SAMPLE, Chosen, Everything, Latents, Reading, read
from vishwamai_mp.cache_augmentation.segments import Segments
from vishwamai_mp.cache_augmentation.selection import choose, summarise
from vishwamai_mp.runtime.device import at_once

_QUERIES = 256  # per block on a CPU, where all segments are read


class ChunkReading(NamedTuple):
    """What a chunk read, and measures without gradient.

    Attributes:
        out: (C, B, H, K).
        mass: (G, N) sum over tokens of the weights on each segment; None where it was not asked for.
        null: sum over tokens and heads of the weight of the null slot.
        entropy: sum over `sampled` tokens and heads of the weights' entropy, nats.
        sampled: how many those are.
    """

    out: Tensor
    mass: Tensor | None
    null: Tensor
    entropy: Tensor
    sampled: Tensor


class Reader(NamedTuple):
    """What all chunks of a row share.

    Attributes:
        segments: of the rows.
        latents: of all segments, (G, N, …).
        retrieve: segments that a token may read before it has to choose.
        carried_until: (B,) position from which on carried segments are another document's; None: nothing is carried.
        counts: whether the mass is wanted.
    """

    segments: Segments
    latents: Latents
    retrieve: int
    carried_until: Tensor | None
    counts: bool

    def __call__(self, q_CBHK: Tensor, start: int) -> ChunkReading:
        """Read for the tokens from position `start` on."""
        if self.latents.keys.shape[1] - 1 <= self.retrieve:
            scores = self.latents.bias.numel()  # of one query of each row and head
            queries = max(1, at_once(q_CBHK, _QUERIES * scores) // scores)
            return self._aligned(q_CBHK, start, min(queries, q_CBHK.shape[0]))
        if self.segments.within is None:
            assert start % self.segments.length == 0, "config.resolve refuses this"
            return self._aligned(q_CBHK, start, self.segments.length)
        assert start == 0, "config.resolve refuses this"
        assert q_CBHK.shape[0] == self.segments.within.shape[1], "config.resolve refuses this"
        return self._by_document(q_CBHK, self.segments.within)

    def _aligned(self, q_CBHK: Tensor, start: int, queries: int) -> ChunkReading:
        """Blocks of consecutive tokens."""
        tokens, rows, heads, _ = q_CBHK.shape
        begins = torch.arange(start, start + tokens, queries, device=q_CBHK.device)[None]
        q = F.pad(q_CBHK.permute(1, 2, 0, 3), (0, 0, 0, -tokens % queries)).flatten(0, 1).unflatten(1, (-1, queries))
        place = torch.arange(q.shape[1] * queries, device=q.device).view(-1, queries)
        real = (place < tokens).expand(q.shape[:3])
        found = self._read(q, begins, real, start)
        return _result(found, found.out.flatten(1, 2)[:, :tokens].unflatten(0, (rows, heads)).permute(2, 0, 1, 3), real)

    def _by_document(self, q_CBHK: Tensor, within_BC: Tensor) -> ChunkReading:
        """Blocks of the tokens of one document's segment, filled up where the document ends."""
        (tokens, rows, heads, _), queries = q_CBHK.shape, self.segments.length
        place = within_BC % queries
        block = (place == 0).cumsum(1) - 1
        blocks = int(block.max()) + 1  # waits for the device: documents decide how many blocks there are
        slot = block * queries + place
        position = torch.arange(tokens, device=slot.device).expand_as(slot)
        token = slot.new_full((rows, blocks * queries), tokens).scatter(1, slot, position)
        row = torch.arange(rows, device=slot.device)[:, None]
        q = q_CBHK[token.clamp(max=tokens - 1), row].transpose(1, 2).flatten(0, 1).unflatten(1, (-1, queries))
        real = (token < tokens).unflatten(1, (-1, queries)).repeat_interleave(heads, 0)
        found = self._read(q, token[:, ::queries], real, start=None)
        out = found.out.flatten(1, 2).unflatten(0, (rows, heads))[row, :, slot]  # (B, C, H, K)
        return _result(found, out.transpose(0, 1), real)

    def _read(self, q_GMQK: Tensor, begins_BM: Tensor, real_GMQ: Tensor, start: int | None) -> Reading:
        """Read for blocks that begin at given positions (behind the row: filled up, no block).

        `start` is where the first begins, as the host knows it; None: segments are more than may be read.
        """
        groups, blocks, queries, _ = q_GMQK.shape
        since, until = self._visible(begins_BM, groups)
        if self.latents.keys.shape[1] - 1 > self.retrieve:
            hidden = (since > 0) | (until <= 0)
            hidden[..., 0] = True
            plan: Chosen | Everything = choose(q_GMQK, summarise(self.latents), hidden, self.retrieve)
        else:
            # The first token behind a segment is the first to read it.
            count = self.segments.last.shape[1]
            assert start is not None
            before = self.latents.keys.shape[1] - count
            ends = range(start + queries - 1, start + blocks * queries, queries)
            plan = Everything(since, until, tuple(before + min(end // self.segments.length, count) for end in ends))
        return read(q_GMQK, self.latents, plan, real_GMQ if self.counts else None)

    def _visible(self, begins_BM: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Intervals of each block's queries that may read each segment, (G, M, N)."""
        begins = begins_BM[..., None]
        since, until = self.segments.last[:, None] + 1 - begins, self.segments.until[:, None] - begins
        rows = max(len(since), 1 if self.carried_until is None else len(self.carried_until))
        since, until = (x.expand(rows, -1, -1) for x in (since, until))
        before = self.latents.keys.shape[1] - since.shape[2]
        since = F.pad(since, (before, 0))
        ends = torch.iinfo(until.dtype).max * torch.ones_like(until[..., :1])  # of the null segment
        if self.carried_until is not None:
            ends = torch.cat((ends, (self.carried_until[:, None, None] - begins).expand(-1, -1, before - 1)), -1)
        until = torch.cat((ends, until), -1)
        return since.repeat_interleave(groups // rows, 0), until.repeat_interleave(groups // rows, 0)


@torch.no_grad()
def _result(found: Reading, out: Tensor, real_GMQ: Tensor) -> ChunkReading:
    sampled = real_GMQ[..., ::SAMPLE]
    null, entropy = (found.null * real_GMQ).sum(), (found.entropy * sampled).sum()
    return ChunkReading(out, found.mass, null, entropy, sampled.sum())
