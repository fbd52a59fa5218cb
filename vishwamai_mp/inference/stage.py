"""One pipeline stage as generation runs it: tokens of many sequences laid end to end, keys and values in blocks.

It reads the model's weights and calls torch directly, without megatron-core's modules between: a decoding step is many
small operations, and what surrounds each of them is what it costs. Weights are those of the model, not copies.

Shapes: N tokens of all sequences, B sequences, D width, H heads (local), G key-value heads (local), R = H/G, K head
width, S keys, F intermediate width (local), V vocabulary (local).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.inference.blocks import BLOCK_TOKENS, BlockPool, CachedSequence
from vishwamai_mp.model import VishwamAIModel
from vishwamai_mp.precision import PrecisionPolicy
from vishwamai_mp.runtime import Runtime, multiplies_natively
from vishwamai_mp.runtime.products import linear_fp32

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
        window: tokens that a token sees, or None.
    """

    def __init__(self, work: Work, pool: BlockPool, window: int | None, device: torch.device) -> None:
        self.window, self.device = window, device
        self.sequences = [sequence for sequence, _ in work]
        self.counts = [len(tokens) for _, tokens in work]
        self.past = [sequence.length for sequence in self.sequences]
        slots: list[int] = []
        positions: list[int] = []
        for sequence, tokens in work:
            slots += pool.extend(sequence, len(tokens))
            positions += range(sequence.length, sequence.length + len(tokens))
            sequence.length += len(tokens)
        self.tokens = torch.tensor([token for _, tokens in work for token in tokens], device=device)
        self.slots = torch.tensor(slots, device=device)
        self.positions = torch.tensor(positions, device=device)
        ends = torch.tensor(self.counts).cumsum(0)
        self.ends = ends.tolist()
        self.last = (ends - 1).to(device)

    @cached_property
    def single(self) -> list[int]:
        """Sequences that read one token."""
        return [i for i, count in enumerate(self.counts) if count == 1]

    @cached_property
    def decode(self) -> tuple[Tensor | slice, int, Tensor | None]:
        """Blocks of `single`, the number of keys, and their mask (B, 1, 1, S) where not all are seen.

        A slice of blocks, which costs no copy, where a single sequence has them in a row.
        """
        blocks = [self.sequences[i].blocks for i in self.single]
        lengths = [self.past[i] + 1 for i in self.single]
        if len(blocks) == 1 and (self.window is None or lengths[0] <= self.window):
            first, count = blocks[0][0], len(blocks[0])
            if blocks[0] == list(range(first, first + count)):
                return slice(first, first + count), lengths[0], None
        widest = max(map(len, blocks))
        table = torch.tensor([row + [row[0]] * (widest - len(row)) for row in blocks], device=self.device)
        longest = max(lengths)
        window = longest if self.window is None else self.window
        if min(lengths) == longest <= window:
            return table.flatten(), longest, None
        keys, length = torch.arange(longest, device=self.device), torch.tensor(lengths, device=self.device)[:, None]
        mask = (keys < length) & (keys >= length - window)
        return table.flatten(), longest, mask[:, None, None]


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
        angles = model.rotary(torch.arange(config.model.max_position_embeddings, device=runtime.device))[:, 0, 0]
        sine = angles.sin()
        sine[:, : self.width // 2].neg_()  # so that a turn is x · cos + (x with its halves exchanged) · sin
        self._cosine, self._sine = angles.cos().to(self.dtype), sine.to(self.dtype)

    def pool(self, tokens: int) -> BlockPool:
        """Memory for this stage's keys and values of so many tokens."""
        return BlockPool(tokens, len(self.layers), self.heads, self.width, self.dtype, self.runtime.device)

    def run(self, batch: Batch, pool: BlockPool, hidden_ND: Tensor | None) -> Tensor:
        """Hidden states after this stage's layers, (N, D).

        Args:
            batch: the new tokens.
            pool: of keys and values.
            hidden_ND: of the stage before; None on the first.
        """
        x = self._embed(batch.tokens) if hidden_ND is None else hidden_ND
        cosine, sine = self._cosine[batch.positions][:, None, None], self._sine[batch.positions][:, None, None]
        eps = self.settings.rms_norm_eps
        for number, layer in enumerate(self.layers):
            if layer.components:
                x = self._run_components(number, layer, x, batch)
            normed = F.rms_norm(x, x.shape[-1:], layer.attention_norm, eps)
            qkv = self._multiply(normed, layer.qkv).view(-1, self.heads, self.repeat + 2, self.width)
            turned = qkv[:, :, : self.repeat + 1]  # queries and the key of each group
            turned.copy_(torch.addcmul(turned * cosine, turned.roll(self.width // 2, -1), sine))
            memory = pool.keys_and_values[number]
            memory[batch.slots] = qkv[:, :, self.repeat :]
            attended = self._attend(qkv, memory, batch).view(x.shape[0], -1)
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
        """x Wᵀ."""
        if self._in_fp32:
            return linear_fp32(x.float(), weight.float()).to(x.dtype)
        return F.linear(x, weight)

    def _sum(self, partial: Tensor) -> Tensor:
        """Over the tensor parallel ranks."""
        if self._group is not None:
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
        table, count, mask = batch.decode
        by_block = memory.view(-1, BLOCK_TOKENS * memory[0].numel())
        found = by_block[table] if isinstance(table, slice) else by_block.index_select(0, table)
        found = found.view(q_BGRK.shape[0], -1, self.heads, 2, self.width)[:, :count]
        k, v = found.permute(3, 0, 2, 1, 4)
        return self._softmax_attention(q_BGRK, k, v, mask)

    def _attend_many(self, qkv: Tensor, memory: Tensor, blocks: list[int], past: int) -> Tensor:
        """All new tokens of one sequence, after `past` that were read before."""
        new, window = qkv.shape[0], self.settings.sliding_window
        q_1HNK = qkv[:, :, : self.repeat].reshape(1, new, -1, self.width).transpose(1, 2)
        if past:
            table = torch.tensor(blocks, device=qkv.device)
            found = memory.view(-1, BLOCK_TOKENS, *memory.shape[1:])[table].flatten(0, 1)[: past + new]
        else:
            found = qkv[:, :, self.repeat :]
        mask = None
        if past or (window is not None and new > window):
            mask = torch.ones(new, past + new, dtype=torch.bool, device=qkv.device).tril(past)
            mask = mask if window is None else mask.triu(past - window + 1)
        k_GSK, v_GSK = found.permute(2, 1, 0, 3)
        out = self._softmax_attention(q_1HNK, k_GSK[None], v_GSK[None], mask, causal=mask is None)
        return out[0].transpose(0, 1).reshape(new, self.heads, self.repeat, self.width)

    def _softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        wide = torch.float32 if self._in_fp32 else self.dtype
        return F.scaled_dot_product_attention(
            q.to(wide),
            k.to(wide),
            v.to(wide),
            attn_mask=mask,
            is_causal=causal,
            scale=1 / math.sqrt(self.width),
            enable_gqa=q.shape[1] != k.shape[1],
        ).to(self.dtype)
