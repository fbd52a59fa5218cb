"""One pipeline stage as generation runs it: tokens of many sequences laid end to end, keys and values in blocks.

It reads the model's weights and calls torch directly, without megatron-core's modules between: a decoding step is many
small operations, and what surrounds each of them is what it costs. Weights are those of the model, not copies.

Shapes: N tokens of all sequences, B sequences, D width, H heads (local), G key-value heads (local), R = H/G, K head
width, T tokens of a block, S keys, F intermediate width (local), V vocabulary (local).
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vishwamai_mp.config import ModelConfig, PretrainConfig
from vishwamai_mp.inference.blocks import BLOCK_TOKENS, BlockPool, CachedSequence
from vishwamai_mp.model import VishwamAIModel
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.runtime import Runtime, is_accelerator, multiplies_natively
from vishwamai_mp.runtime.products import product, skinny_linear_fp32

_WORTH_SHARING = 4  # blocks; fewer are sooner read once per sequence
_WORTH_IN_PLACE = 256  # keys of all sequences; fewer are sooner collected
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # only its pattern of places is used
Work = Sequence[tuple[CachedSequence, Sequence[int]]]


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer, and its components by name."""

    components: dict[str, nn.Module]
    attention_norm: Tensor
    qkv: Tensor
    projection: Tensor
    mlp_norm: Tensor
    fc1: Tensor
    fc2: Tensor

    @classmethod
    def of(cls, layer: Any) -> "_Layer":
        attention, mlp = layer.self_attention, layer.mlp
        return cls(
            components={name: getattr(layer, name) for name in layer.component_names},
            attention_norm=_norm_weight(layer.input_layernorm, attention.linear_qkv),
            qkv=attention.linear_qkv.weight,
            projection=attention.linear_proj.weight,
            mlp_norm=_norm_weight(layer.pre_mlp_layernorm, mlp.linear_fc1),
            fc1=mlp.linear_fc1.weight,
            fc2=mlp.linear_fc2.weight,
        )


def _norm_weight(norm: nn.Module, linear: nn.Module) -> Tensor:
    """Of a norm of its own, or of one fused into the linear layer (Transformer Engine)."""
    return norm.weight if hasattr(norm, "weight") else linear.layer_norm_weight  # type: ignore[return-value]


class Batch:
    """Where the new tokens of some sequences go; makes room for them in the pool.

    Args:
        work: sequences and what each reads now, at least one token. A sequence appears once.
        pool: of keys and values.
        settings: of the model.
    """

    def __init__(self, work: Work, pool: BlockPool, settings: ModelConfig) -> None:
        assert settings.num_key_value_heads is not None
        self.window, self.repeat = settings.sliding_window, settings.num_attention_heads // settings.num_key_value_heads
        self.memory = pool.keys_and_values[0]
        self.device = self.memory.device
        self.sequences = [sequence for sequence, _ in work]
        self.counts = [len(tokens) for _, tokens in work]
        self.past = [sequence.length for sequence in self.sequences]
        blocks: list[int] = []
        positions: list[int] = []
        for sequence, tokens in work:
            pool.extend(sequence, len(tokens))
            new = range(sequence.length, sequence.length + len(tokens))
            blocks += [sequence.blocks[position // BLOCK_TOKENS] for position in new]
            positions += new
            sequence.length += len(tokens)
        self.tokens = torch.tensor([token for _, tokens in work for token in tokens], device=self.device)
        self.positions = torch.tensor(positions, device=self.device)
        self.blocks = torch.tensor(blocks, device=self.device)
        self.places = self.positions % BLOCK_TOKENS
        ends = torch.tensor(self.counts).cumsum(0)
        self.ends = ends.tolist()
        self.last = (ends - 1).to(self.device)

    @cached_property
    def single(self) -> list[int]:
        """Sequences that read one token."""
        return [i for i, count in enumerate(self.counts) if count == 1]

    @cached_property
    def decode(self) -> list["_Reads"]:
        """What the sequences of `single` read; those with a long beginning in common read it together."""
        beginnings: dict[int, list[int]] = {}
        for row, i in enumerate(self.single):
            beginnings.setdefault(self.sequences[i].blocks[0], []).append(row)
        reads, rest = [], []
        for rows in beginnings.values():
            common = _beginning([self.sequences[self.single[row]].blocks for row in rows]) if len(rows) > 1 else []
            if len(common) < _WORTH_SHARING or self.window is not None:
                rest += rows
            else:  # whole blocks: the one that a sequence writes to is its own
                reads.append(self._reads(rows, common))
        return [*reads, self._reads(sorted(rest), [])] if rest else reads

    def _reads(self, rows: list[int], common: list[int]) -> "_Reads":
        numbers = [self.single[row] for row in rows]
        blocks = [self.sequences[i].blocks[len(common) :] for i in numbers]
        lengths = [self.past[i] + 1 - len(common) * BLOCK_TOKENS for i in numbers]
        window = max(lengths) if self.window is None else self.window
        mask = None
        if min(lengths) < max(lengths) or max(lengths) > window:
            keys, length = torch.arange(max(lengths), device=self.device), torch.tensor(lengths, device=self.device)
            mask = ((keys < length[:, None]) & (keys >= length[:, None] - window))[:, None, None]
        widest = max(map(len, blocks))
        own = [row + [row[0]] * (widest - len(row)) for row in blocks]
        return _Reads(
            rows=rows,
            common=_pieces([common], self.memory) if common else None,
            own=_pieces(own, self.memory),
            count=max(lengths),
            mask=mask,
            repeat=self.repeat,
            size=self.memory.numel() // self.memory.shape[-1],
        )


def _pieces(blocks: list[list[int]], memory: Tensor) -> Tensor:
    """Numbers of the pieces (T, K) of memory that these blocks of B sequences consist of, (B, G, 2, blocks)."""
    heads = memory.shape[1]
    first = torch.tensor(blocks, device=memory.device)[:, None, None] * (2 * heads)
    return first + torch.arange(2 * heads, device=memory.device).view(heads, 2, 1)


def _collect(pieces: Tensor, memory: Tensor) -> Tensor:
    """Keys and values in these pieces, (B, G, 2, S, K)."""
    found = memory.view(-1, BLOCK_TOKENS * memory.shape[-1]).index_select(0, pieces.flatten())
    return found.view(*pieces.shape[:3], -1, memory.shape[-1])


def _beginning(rows: list[list[int]]) -> list[int]:
    """What all rows begin with."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in same]


@dataclass(frozen=True)
class _Reads:
    """Keys of some sequences that read one token each.

    On a CPU, collecting what lies in many blocks costs more than the attention. Two operators of torch read rows where
    they lie: the product of matrices at given places, for q Kᵀ, and the weighted sum of embeddings, for the values.

    Attributes:
        rows: of `Batch.single`, ascending.
        common: pieces of the blocks that all of them begin with, (1, G, 2, blocks), if any.
        own: of the blocks behind, as many for each, (B, G, 2, blocks).
        count: own keys, S.
        mask: (B, 1, 1, S) of own keys, where not all are seen.
        repeat: R.
        size: of memory, in rows of K.
    """

    rows: list[int]
    common: Tensor | None
    own: Tensor
    count: int
    mask: Tensor | None
    repeat: int
    size: int

    def in_place(self, memory: Tensor) -> bool:
        """Own keys and values are better not collected."""
        return (
            not is_accelerator(memory)
            and memory.dtype == torch.float32
            and len(self.rows) * self.count >= _WORTH_IN_PLACE
        )

    def scores(self, q_BGRK: Tensor, memory: Tensor) -> Tensor:
        """q Kᵀ with own keys, (B, G, R, S)."""
        width = q_BGRK.shape[-1]
        table = memory.view(-1, width)
        found = torch.sparse.sampled_addmm(self._key_places, q_BGRK.reshape(-1, width), table.t(), beta=0.0)
        return found.values().view(*q_BGRK.shape[:3], -1)

    def mix(self, weights_BGRS: Tensor, memory: Tensor) -> Tensor:
        """Own values by their weights, (B, G, R, K)."""
        table, weights = memory.view(-1, memory.shape[-1]), weights_BGRS.flatten(0, 2)
        mixed = F.embedding_bag(self._places[1], table, mode="sum", per_sample_weights=weights)
        return mixed.view(*weights_BGRS.shape[:3], -1)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Rows of own keys and of own values in memory, of each query, (B·G·R, S)."""
        tokens = torch.arange(BLOCK_TOKENS, device=self.own.device)
        rows = (self.own[..., None] * BLOCK_TOKENS + tokens).flatten(-2)[..., : self.count]
        keys, values = rows[:, :, None].expand(-1, -1, self.repeat, -1, -1).flatten(0, 2).unbind(1)
        return keys, values.contiguous()

    @cached_property
    def _key_places(self) -> Tensor:
        """As a matrix with an entry at each, (B·G·R, rows of memory)."""
        keys, _ = self._places
        starts = torch.arange(len(keys) + 1) * self.count
        return torch.sparse_csr_tensor(
            starts, keys.flatten(), torch.zeros(keys.numel()), (len(keys), self.size), check_invariants=False
        )


class Stage:
    """The layers of one pipeline stage, with the embedding on the first and the output layer on the last."""

    def __init__(self, config: PretrainConfig, runtime: Runtime, model: VishwamAIModel) -> None:
        self.model, self.settings, self.runtime = model, config.model, runtime
        self.dtype = PrecisionPolicy.of(config.precision).compute
        self.layers = [_Layer.of(layer) for layer in model.decoder.layers]
        assert config.model.num_key_value_heads is not None
        assert config.model.head_dim is not None
        tensor = config.parallel.tensor_model_parallel_size
        self.heads = config.model.num_key_value_heads // tensor
        self.repeat = config.model.num_attention_heads // config.model.num_key_value_heads
        self.width = config.model.head_dim
        self._group = runtime.groups.tp if tensor > 1 else None
        self._in_fp32 = self.dtype == torch.float32 or not multiplies_natively(self.dtype)
        self._wide = torch.float32 if self._in_fp32 else self.dtype
        angles = model.rotary(torch.arange(config.model.max_position_embeddings, device=runtime.device))[:, 0, 0]
        sine = angles.sin()
        sine[:, : self.width // 2].neg_()  # so that a turn is x · cos + (x with its halves exchanged) · sin
        self._cosine, self._sine = angles.cos().to(self.dtype), sine.to(self.dtype)

    def pool(self, tokens: int) -> BlockPool:
        """Memory for this stage's keys and values of so many tokens."""
        return BlockPool(tokens, len(self.layers), self.heads, self.width, self.dtype, self.runtime.device)

    def run(self, batch: Batch, pool: BlockPool, hidden_ND: Tensor | None, wanted: Tensor | None = None) -> Tensor:
        """Hidden states after this stage's layers, (N, D), or of the wanted tokens.

        Args:
            batch: the new tokens.
            pool: of keys and values.
            hidden_ND: of the stage before; None on the first.
            wanted: tokens by number; None: all. The others end with the last layer's attention.
        """
        x = self._embed(batch.tokens) if hidden_ND is None else hidden_ND
        cosine, sine = self._cosine[batch.positions][:, None, None], self._sine[batch.positions][:, None, None]
        eps = self.settings.rms_norm_eps
        for number, layer in enumerate(self.layers):
            if layer.components:
                x = self._run_components(number, layer, x, batch)
            normed = F.rms_norm(x, x.shape[-1:], layer.attention_norm, eps)
            qkv = self._multiply(normed, layer.qkv).contiguous().view(-1, self.heads, self.repeat + 2, self.width)
            turned = qkv[:, :, : self.repeat + 1]  # queries and the key of each group
            turned.copy_(torch.addcmul(turned * cosine, turned.roll(self.width // 2, -1), sine))
            memory = pool.keys_and_values[number]
            memory[batch.blocks, :, :, batch.places] = qkv[:, :, self.repeat :]
            attended = self._attend(qkv, memory, batch).reshape(x.shape[0], -1)
            if wanted is not None and number == len(self.layers) - 1:
                x, attended = x[wanted], attended[wanted]
            x = x + self._sum(self._multiply(attended, layer.projection))
            normed = F.rms_norm(x, x.shape[-1:], layer.mlp_norm, eps)
            gate, up = self._multiply(normed, layer.fc1).chunk(2, -1)
            x = x + self._sum(self._multiply(F.silu(gate).mul_(up), layer.fc2))
        return x

    def head(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, V) and the normed hidden states (N, D) that they come from."""
        norm = self.model.decoder.final_layernorm
        normed = F.rms_norm(hidden_ND, hidden_ND.shape[-1:], norm.weight, self.settings.rms_norm_eps)
        tied = self.settings.tie_word_embeddings
        weight = self.model.shared_embedding_or_output_weight() if tied else self.model.output_layer.weight
        return self._multiply(normed, weight), normed

    def _embed(self, tokens: Tensor) -> Tensor:
        weight = self.model.embedding.word_embeddings.weight
        if self._group is None:
            return F.embedding(tokens, weight)
        local = tokens - self._group.rank() * weight.shape[0]
        outside = (local < 0) | (local >= weight.shape[0])
        return self._sum(F.embedding(local.masked_fill(outside, 0), weight).masked_fill(outside[:, None], 0))

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """x Wᵀ, (N, O); of some N it lies in memory as (O, N)."""
        if self._in_fp32:
            return skinny_linear_fp32(x.float(), weight.float()).to(x.dtype)
        return F.linear(x, weight)

    def _sum(self, partial: Tensor) -> Tensor:
        """Over the tensor parallel ranks."""
        if self._group is not None:
            partial = partial.contiguous()
            dist.all_reduce(partial, group=self._group)
        return partial

    def _run_components(self, number: int, layer: _Layer, x_ND: Tensor, batch: Batch) -> Tensor:
        for name, component in layer.components.items():
            parts = []
            for sequence, part in zip(batch.sequences, x_ND.split(batch.counts), strict=True):
                out, sequence.states[number, name] = component(part[:, None], None, sequence.states.get((number, name)))
                parts.append(out[:, 0])
            x_ND = torch.cat(parts)
        return x_ND

    def _attend(self, qkv: Tensor, memory: Tensor, batch: Batch) -> Tensor:
        """(N, G, R, K)."""
        if len(batch.single) == len(batch.counts):
            return self._attend_single(qkv[:, :, : self.repeat], memory, batch)
        out = torch.empty_like(qkv[:, :, : self.repeat])
        for i, count in enumerate(batch.counts):
            if count > 1:
                rows = slice(batch.ends[i] - count, batch.ends[i])
                out[rows] = self._attend_many(qkv[rows], memory, batch.sequences[i].blocks, batch.past[i])
        if batch.single:
            singles = batch.last[batch.single]
            out[singles] = self._attend_single(qkv[singles][:, :, : self.repeat], memory, batch)
        return out

    def _attend_single(self, q_BGRK: Tensor, memory: Tensor, batch: Batch) -> Tensor:
        """One query per sequence: the queries of a group see the same keys, so they take the place of positions."""
        if len(batch.decode) == 1:
            return self._attend_together(q_BGRK, memory, batch.decode[0])
        out = torch.empty_like(q_BGRK)
        for reads in batch.decode:
            out[reads.rows] = self._attend_together(q_BGRK[reads.rows], memory, reads)
        return out

    def _attend_together(self, q_BGRK: Tensor, memory: Tensor, reads: _Reads) -> Tensor:
        rows, wide, in_place = q_BGRK.shape[0], self._wide, reads.in_place(memory)
        if not in_place:
            k, v = _collect(reads.own, memory)[..., : reads.count, :].unbind(2)
            if reads.common is None:
                return self._softmax_attention(q_BGRK, k, v, reads.mask)
        q = (q_BGRK * (1 / math.sqrt(self.width))).to(wide)
        scores = reads.scores(q, memory) if in_place else q @ k.to(wide).mT
        scores = scores if reads.mask is None else scores.masked_fill(~reads.mask, -math.inf)
        if reads.common is None:
            return reads.mix(scores.softmax(-1), memory)
        # Keys that all sequences share are read once for all queries: (G, B·R, K) by (G, K, S).
        common_k, common_v = _collect(reads.common, memory)[0].to(wide).unbind(1)
        shared = product(q.transpose(0, 1).flatten(1, 2), common_k.mT).unflatten(1, (rows, -1)).transpose(0, 1)
        shared, own = torch.cat((shared, scores), -1).softmax(-1).split([shared.shape[-1], reads.count], -1)
        out = product(shared.transpose(0, 1).flatten(1, 2), common_v).unflatten(1, (rows, -1)).transpose(0, 1)
        return (out + (reads.mix(own, memory) if in_place else own @ v.to(wide))).to(self.dtype)

    def _attend_many(self, qkv: Tensor, memory: Tensor, blocks: list[int], past: int) -> Tensor:
        """All new tokens of one sequence, after `past` that were read before."""
        new, window = qkv.shape[0], self.settings.sliding_window
        q_1HNK = qkv[:, :, : self.repeat].reshape(1, new, -1, self.width).transpose(1, 2)
        if past:
            k_GSK, v_GSK = _collect(_pieces([blocks], memory), memory)[0, ..., : past + new, :].unbind(1)
        else:
            k_GSK, v_GSK = qkv[:, :, self.repeat :].permute(2, 1, 0, 3)
        mask = None
        if past or (window is not None and new > window):
            mask = torch.ones(new, past + new, dtype=torch.bool, device=qkv.device).tril(past)
            mask = mask if window is None else mask.triu(past - window + 1)
        out = self._softmax_attention(q_1HNK, k_GSK[None], v_GSK[None], mask, causal=mask is None)
        return out[0].transpose(0, 1).reshape(new, self.heads, self.repeat, self.width)

    def _softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        wide = self._wide
        return F.scaled_dot_product_attention(
            q.to(wide),
            k.to(wide),
            v.to(wide),
            attn_mask=mask,
            is_causal=causal,
            scale=1 / math.sqrt(self.width),
            enable_gqa=q.shape[1] != k.shape[1],
        ).to(self.dtype)
