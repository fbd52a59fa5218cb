"""New tokens of many sequences laid end to end, and attention over keys and values that lie in shared blocks.

This is the `KeyValues` of generation (model/key_values.py).
Shapes: N tokens of all sequences, B sequences, D width, G key-value heads (local), R queries of each, K head width,
T tokens of a block, S keys.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vishwamai_mp.config import ModelConfig
from vishwamai_mp.config.layer_windows import layer_window
from vishwamai_mp.inference.blocks import BLOCK_TOKENS, BlockPool, KvSequence, mark_places
from vishwamai_mp.inference.reads import Reads, collect, common_beginning, pieces
from vishwamai_mp.model.blocked_attention import blocked_attention
from vishwamai_mp.model.rotary import frequency_length
from vishwamai_mp.model.softcap import softcap_
from vishwamai_mp.runtime import multiplies_natively
from vishwamai_mp.runtime.products import product

_FEWEST_SHARED_BLOCKS = 4  # below, reading them once for each sequence is faster than one more product
Work = Sequence[tuple[KvSequence, Sequence[int]]]


class Batch:
    """Where the new tokens of some sequences go; makes room for them in the pool.

    Args:
        work: sequences and what each reads now, at least one token. A sequence appears once.
        pool: of keys and values.
        settings: of the model.
        first_layer: number (from 1) of the first layer on this pipeline stage.
        guessed: how many of each sequence's new tokens, its last ones, may be taken back; None: none.
    """

    def __init__(
        self,
        work: Work,
        pool: BlockPool,
        settings: ModelConfig,
        first_layer: int,
        guessed: Sequence[int] | None = None,
    ) -> None:
        assert settings.num_key_value_heads is not None
        assert settings.head_dim is not None
        self.scale = settings.attention_multiplier or 1 / math.sqrt(settings.head_dim)
        self.softcap = settings.attention_softcap
        self.settings, self.repeat = settings, settings.num_attention_heads // settings.num_key_value_heads
        self.pool, self.first_layer = pool, first_layer
        self.device, self.dtype = pool.keys_and_values.device, pool.keys_and_values.dtype
        # Scores are computed in this type: 16-bit products without hardware for them are slow.
        self.wide = self.dtype if multiplies_natively(self.dtype) else torch.float32
        self._known_reads: dict[int | None, list[Reads]] = {}
        self.sequences = [sequence for sequence, _ in work]
        self.counts = [len(tokens) for _, tokens in work]
        self.guessed = [0] * len(work) if guessed is None else list(guessed)
        self.past = [sequence.length for sequence in self.sequences]
        blocks: list[int] = []
        positions: list[int] = []
        for sequence, tokens in work:
            pool.extend(sequence, len(tokens))
            new = range(sequence.length, sequence.length + len(tokens))
            blocks += [sequence.blocks[position // BLOCK_TOKENS] for position in new]
            positions += new
            if sequence.marks is not None:
                places = mark_places(sequence.length, sequence.length + len(tokens))
                before = sorted(sequence.marks.items())[-1:] if places else sequence.marks.items()
                sequence.marks = {**dict(before), **{place: {} for place in places}}
            sequence.length += len(tokens)
            sequence.revocable = {}
            sequence.frequency_length = frequency_length(settings, sequence.length)
        lengths = [sequence.frequency_length for sequence in self.sequences]
        self.frequency_lengths = lengths if any(lengths) else None  # None: the frequencies of short texts
        self.tokens = torch.tensor([token for _, tokens in work for token in tokens], device=self.device)
        self.positions = torch.tensor(positions, device=self.device)
        self.blocks = torch.tensor(blocks, device=self.device)
        self.places = self.positions % BLOCK_TOKENS
        ends = torch.tensor(self.counts).cumsum(0)
        self.ends = ends.tolist()
        self.last = (ends - 1).to(self.device)

    @property
    def judged(self) -> Tensor:
        """The last certain token of each sequence and its guesses, by number."""
        if not any(self.guessed):
            return self.last
        places = zip(self.ends, self.guessed, strict=True)
        return torch.tensor([i for end, guessed in places for i in range(end - 1 - guessed, end)], device=self.device)

    @cached_property
    def single(self) -> list[int]:
        """Sequences that read one token."""
        return [i for i, count in enumerate(self.counts) if count == 1]

    def run_component(self, layer: int, name: str, component: nn.Module, hidden_N1D: Tensor) -> Tensor:
        """See `KeyValues`."""
        parts = []
        for sequence, hidden, past, guessed in zip(
            self.sequences, hidden_N1D.split(self.counts), self.past, self.guessed, strict=True
        ):
            certain = past + len(hidden) - guessed
            marks = {place: states for place, states in (sequence.marks or {}).items() if place > past}
            states = []
            # One by one behind the certain tokens: each of the guesses may turn out to be the first that is wrong.
            ends = sorted({*marks, *range(certain, certain + guessed + 1)})
            for part, end in zip(hidden.tensor_split([end - past for end in ends[:-1]]), ends, strict=True):
                out, state = component(part, None, sequence.states.get((layer, name)))
                sequence.states[layer, name] = state
                parts.append(out)
                if end in marks:
                    marks[end][layer, name] = state
                if end >= certain:
                    states.append(state)
            if guessed:
                sequence.revocable[layer, name] = states
        return torch.cat(parts)

    def attend(self, layer: int, query_NGRK: Tensor, key_value_NG2K: Tensor) -> Tensor:
        """See `KeyValues`."""
        kv = self.pool.keys_and_values[layer - self.first_layer]
        kv[self.blocks, :, :, self.places] = key_value_NG2K
        window = layer_window(self.settings, layer - 1)
        if len(self.single) == len(self.counts):
            return self._attend_single(query_NGRK, kv, window)
        out = torch.empty_like(query_NGRK)
        for i, count in enumerate(self.counts):
            if count > 1:
                rows = slice(self.ends[i] - count, self.ends[i])
                out[rows] = self._attend_many(query_NGRK[rows], key_value_NG2K[rows], kv, window, i)
        if self.single:
            singles = self.last[self.single]
            out[singles] = self._attend_single(query_NGRK[singles], kv, window)
        return out

    def _reads(self, window: int | None) -> list[Reads]:
        """What the sequences of `single` read in layers with a window, or without; the same in each of these."""
        if window not in self._known_reads:
            self._known_reads[window] = self._find_reads(window)
        return self._known_reads[window]

    def _find_reads(self, window: int | None) -> list[Reads]:
        """Those with a long beginning in common read it together."""
        beginnings: dict[int, list[int]] = {}
        for row, i in enumerate(self.single):
            beginnings.setdefault(self.sequences[i].blocks[0], []).append(row)
        reads, rest = [], []
        for rows in beginnings.values():
            blocks = [self.sequences[self.single[row]].blocks for row in rows]
            common = common_beginning(blocks) if len(rows) > 1 else []
            if len(common) < _FEWEST_SHARED_BLOCKS or window is not None:
                rest += rows
            else:  # whole blocks: the one that a sequence writes to is its own
                reads.append(self._reads_of(rows, common, window))
        return [*reads, self._reads_of(sorted(rest), [], window)] if rest else reads

    def _reads_of(self, rows: list[int], common: list[int], window: int | None) -> Reads:
        numbers = [self.single[row] for row in rows]
        return Reads.of(
            rows,
            common,
            own=[self.sequences[i].blocks[len(common) :] for i in numbers],
            lengths=[self.past[i] + 1 - len(common) * BLOCK_TOKENS for i in numbers],
            window=window,
            repeat=self.repeat,
            kv=self.pool.keys_and_values[0],
        )

    def _attend_single(self, query_BGRK: Tensor, kv: Tensor, window: int | None) -> Tensor:
        """One query per sequence: the queries of a group see the same keys, so they take the place of positions."""
        found = self._reads(window)
        if len(found) == 1:
            return self._attend_together(query_BGRK, kv, found[0])
        out = torch.empty_like(query_BGRK)
        for reads in found:
            out[reads.rows] = self._attend_together(query_BGRK[reads.rows], kv, reads)
        return out

    def _attend_together(self, q_BGRK: Tensor, kv: Tensor, reads: Reads) -> Tensor:
        rows, wide, in_place = q_BGRK.shape[0], self.wide, reads.in_place(kv)
        if not in_place:
            k, v = collect(reads.own, kv)[..., : reads.count, :].unbind(2)
            if reads.common is None and not self.softcap:
                return self._softmax_attention(q_BGRK, k, v, reads.mask)
        q = (q_BGRK * self.scale).to(wide)
        scores = reads.scores(q, kv) if in_place else q @ k.to(wide).mT
        scores = softcap_(scores, self.softcap) if self.softcap else scores
        scores = scores if reads.mask is None else scores.masked_fill(~reads.mask, -math.inf)
        if reads.common is None:
            weights = scores.softmax(-1)
            return reads.mix(weights, kv) if in_place else (weights @ v.to(wide)).to(self.dtype)
        # Keys that all sequences share are read once for all queries: (G, B·R, K) by (G, K, S).
        common_k, common_v = collect(reads.common, kv)[0].to(wide).unbind(1)
        shared = product(q.transpose(0, 1).flatten(1, 2), common_k.mT).unflatten(1, (rows, -1)).transpose(0, 1)
        shared = softcap_(shared, self.softcap) if self.softcap else shared
        shared, own = torch.cat((shared, scores), -1).softmax(-1).split([shared.shape[-1], reads.count], -1)
        out = product(shared.transpose(0, 1).flatten(1, 2), common_v).unflatten(1, (rows, -1)).transpose(0, 1)
        return (out + (reads.mix(own, kv) if in_place else own @ v.to(wide))).to(self.dtype)

    def _attend_many(
        self, q_NGRK: Tensor, key_value_NG2K: Tensor, kv: Tensor, window: int | None, sequence: int
    ) -> Tensor:
        """All new tokens of one sequence, after those that were read before."""
        new, past = len(q_NGRK), self.past[sequence]
        if past:
            found = collect(pieces([self.sequences[sequence].blocks], kv), kv)
            k_GSK, v_GSK = found[0, ..., : past + new, :].unbind(1)
        else:
            k_GSK, v_GSK = key_value_NG2K.permute(2, 1, 0, 3)
        mask = None
        if past or (window is not None and new > window):
            mask = torch.ones(new, past + new, dtype=torch.bool, device=self.device).tril(past)
            mask = mask if window is None else mask.triu(past - window + 1)
        q_1HNK = q_NGRK.flatten(1, 2).transpose(0, 1)[None]
        out_1HNK = self._softmax_attention(q_1HNK, k_GSK[None], v_GSK[None], mask, causal=mask is None)
        return out_1HNK[0].transpose(0, 1).reshape(q_NGRK.shape)

    def _softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        wide = self.wide
        if self.softcap:
            repeat = q.shape[1] // k.shape[1]
            wide_k, wide_v = (x.to(wide).repeat_interleave(repeat, 1) for x in (k, v))
            seen = mask if mask is None else mask[None, None]
            return blocked_attention(q.to(wide), wide_k, wide_v, seen, self.scale, self.softcap).to(self.dtype)
        return F.scaled_dot_product_attention(
            q.to(wide),
            k.to(wide),
            v.to(wide),
            attn_mask=mask,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        ).to(self.dtype)
