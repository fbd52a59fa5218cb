"""VishwamAI for transformers: a Llama-like decoder whose layers may carry a neural memory and a differentiable cache.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; `generate()` with batches, left padding and
beams. Components run before attention, each a residual branch; what they know of earlier tokens travels with the
key-value cache. Written for clarity: components work in fp32 and loop over chunks, segments and, in the cache, rows.

Shapes: B rows, T tokens, D width, H heads of a component, K their width, L levels (memory) or latents of a segment
(cache), J taps, S tokens of a segment, N closed segments, P parts of a memory's state.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, MistralForCausalLM, MistralModel, MistralPreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer, MistralRMSNorm

from .configuration_vishwamai import VishwamaiConfig

TAPS = 4
MAX_MOMENTUM = 0.9
LOGIT_LIMIT = 30.0
IMPORTANCE_WIDTH = 8


@dataclass(frozen=True)
class MemoryState:
    """What a memory knows after some tokens: the convolution's last inputs (B, J−1, H, 3·L·K); of each level the fast
    weights (B, H, P, K, K) and the last momentum ratio (B, H)."""

    recent: Tensor
    levels: tuple[Tensor, ...]
    ratios: tuple[Tensor | None, ...]

    def rows(self, index: Tensor) -> "MemoryState":
        """The state of some rows."""
        levels = tuple(level[index] for level in self.levels)
        return MemoryState(self.recent[index], levels, tuple(None if r is None else r[index] for r in self.ratios))


class NeuralMemory(nn.Module):
    """Fast weights per head, written by gradient descent with momentum and forgetting at every token, then read."""

    def __init__(self, config: VishwamaiConfig) -> None:
        super().__init__()
        assert config.memory
        options = config.memory
        self.heads, self.head_dim, self.levels = options["heads"], options["head_dim"], options["levels"]
        self.chunk_size, self.dropout, self.eps = options["chunk_size"], options["dropout"], config.rms_norm_eps
        self.gates = 3 if options["momentum"] else 2
        self.convolved = 3 * self.levels * self.head_dim
        width = self.heads * self.head_dim
        per_head = self.convolved + self.head_dim + self.levels * self.gates
        self.norm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.projection = nn.Linear(config.hidden_size, self.heads * per_head, bias=False)
        self.output = nn.Linear(width, config.hidden_size, bias=False)
        self.taps = nn.Parameter(torch.zeros(self.heads * self.convolved * TAPS))
        self.gate_bias = nn.Parameter(torch.zeros(self.heads * self.levels * self.gates))
        self.read_norm = nn.Parameter(torch.ones(width))
        self.level_mix = nn.Parameter(torch.zeros(self.heads * self.levels)) if self.levels > 1 else None

    def forward(self, hidden: Tensor, padding: Tensor | None, state: MemoryState | None) -> tuple[Tensor, MemoryState]:
        """Add what the memory answers.

        Args:
            hidden: (B, T, D).
            padding: (B,) tokens at each row's beginning that are none; or None.
            state: after the tokens before.
        """
        projected = self.projection(self.norm(hidden)).unflatten(-1, (self.heads, -1)).float()
        inputs, read_gate, logits = projected.split([self.convolved, self.head_dim, self.levels * self.gates], -1)
        present = None
        if padding is not None:
            present = torch.arange(hidden.shape[1], device=hidden.device) >= padding[:, None]
            inputs = inputs * present[..., None, None]
        mixed, recent = self._convolve(inputs, state)
        opened = logits + self.gate_bias.float().view(self.heads, -1)
        reads, levels, ratios = self._run_levels(mixed, opened.unflatten(-1, (self.levels, -1)), present, state)
        read = reads[0]
        if self.level_mix is not None:
            mix = self.level_mix.float().view(self.heads, -1).softmax(-1)
            read = torch.stack([out * mix[:, level, None] for level, out in enumerate(reads)]).sum(0)
        read = F.rms_norm(read, (self.head_dim,), eps=self.eps) * self.read_norm.float().view(self.heads, -1)
        out = self.output((read_gate.sigmoid() * read).flatten(-2).to(hidden.dtype))
        out = F.dropout(out, self.dropout, self.training)
        return hidden + out, MemoryState(recent, levels, ratios)

    def _convolve(self, inputs: Tensor, state: MemoryState | None) -> tuple[Tensor, Tensor]:
        """Each channel with its last J − 1 predecessors; those, for the next tokens."""
        before = state.recent if state else inputs.new_zeros(inputs.shape[0], TAPS - 1, *inputs.shape[2:])
        padded = torch.cat((before, inputs), 1)
        taps = self.taps.float().view(self.heads, self.convolved, TAPS)
        mixed = torch.stack([padded[:, tap : tap + inputs.shape[1]] * taps[..., tap] for tap in range(TAPS)]).sum(0)
        return mixed, padded[:, -(TAPS - 1) :]

    def _run_levels(
        self, mixed: Tensor, logits: Tensor, present: Tensor | None, state: MemoryState | None
    ) -> tuple[list[Tensor], tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """The cascade: each level stores what the one before it missed."""
        parts = mixed.unflatten(-1, (3 * self.levels, self.head_dim)).unbind(-2)
        reads, levels, ratios, missed = [], [], [], None
        for level in range(self.levels):
            query, key, value = parts[3 * level : 3 * level + 3]
            ratio = state.ratios[level] if state else None
            rate, log_forget, log_momentum, ratio = open_gates(logits[..., level, :], ratio)
            if present is not None:
                rate = rate * present[..., None]
            if missed is not None:
                value = value - missed
            asked = [query] if level == self.levels - 1 else [query, parts[3 * level + 4]]
            memory = state.levels[level] if state else None
            found, memory = delta_rule(asked, key, value, log_forget, log_momentum, rate, memory, self.chunk_size)
            reads.append(found[0])
            missed = found[-1]
            levels.append(memory)
            ratios.append(ratio)
        return reads, tuple(levels), tuple(ratios)


def open_gates(logits: Tensor, ratio: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Rate θ, ln α, ln of the momentum coefficient and the last token's momentum ratio, from (B, T, H, 2 or 3).

    The write is limited such that the memory cannot grow, whatever the gates do from token to token.
    """
    logits = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    write, log_forget = logits[..., 0].sigmoid(), -F.softplus(logits[..., 1])
    if logits.shape[-1] == 2:
        return write, log_forget, None, None
    held = MAX_MOMENTUM * logits[..., 2].sigmoid()
    log_released = torch.log1p(-held)
    ratios = math.log(MAX_MOMENTUM) + F.logsigmoid(logits[..., 2]) - log_released
    before = torch.zeros_like(ratios[:, :1]) if ratio is None else ratio[:, None]
    log_momentum = log_forget + log_released + torch.cat((before, ratios[:, :-1]), 1)
    share = 1 / ((1 + held.square() / MAX_MOMENTUM) * (1 + MAX_MOMENTUM))
    limit = torch.minimum(2 * (1 - held.square()) * share, share.sqrt())
    return write * limit * (1 - held), log_forget, log_momentum, ratios[:, -1]


def delta_rule(
    reads: list[Tensor],
    keys: Tensor,
    values: Tensor,
    log_forget: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    state: Tensor | None,
    chunk_size: int,
) -> tuple[list[Tensor], Tensor]:
    """u = θ(v − Mᵀk), S = ηS + kuᵀ, M = αM + S, o = Mᵀq at every token, exactly, a chunk at a time.

    Args:
        reads: each (B, T, H, K).
        keys, values: (B, T, H, K).
        log_forget, log_momentum, rate: (B, T, H).
        state: (B, H, P, K, K), M and, with momentum, S; None: zero.
        chunk_size: tokens.

    Returns:
        each read's answers (B, T, H, K), and the state after the last token.
    """
    k, v, *queries = (x.transpose(1, 2) for x in (_unit(keys), values, *(_unit(q) for q in reads)))
    decays = [x.transpose(1, 2) for x in (log_forget, log_momentum, rate) if x is not None]
    parts = len(decays) - 1
    if state is None:
        state = k.new_zeros(*k.shape[:2], parts, k.shape[-1], k.shape[-1])
    answers: list[list[Tensor]] = [[] for _ in reads]
    for first in range(0, k.shape[2], chunk_size):
        chunk = slice(first, first + chunk_size)
        found, state = _chunk(
            [q[:, :, chunk] for q in queries], k[:, :, chunk], v[:, :, chunk], [x[..., chunk] for x in decays], state
        )
        for answer, out in zip(answers, found, strict=True):
            answer.append(out)
    return [torch.cat(answer, 2).transpose(1, 2) for answer in answers], state


def _chunk(
    queries: list[Tensor], k: Tensor, v: Tensor, decays: list[Tensor], state: Tensor
) -> tuple[list[Tensor], Tensor]:
    """All of a chunk's u at once: they solve one unit lower triangular system. Tensors are (B, H, C, ·)."""
    theta = decays[-1][..., None]
    forget = _products(decays[0])  # column 0: of what is carried in; column j + 1: of token j's write
    if len(decays) == 2:
        reach, worth = forget, [forget[..., :1]]
        momentum = None
    else:
        momentum = _products(decays[1])
        reach = forget[..., 1:] @ momentum
        worth = [forget[..., :1], reach[..., :1]]
    carried = state.unbind(2)
    before = [_delay(x, first) for x, first in zip(worth, (1.0, 0.0), strict=False)]
    known = sum(x * (k @ part) for x, part in zip(before, carried, strict=True))
    system = theta * (k @ k.mT) * _delay(reach[..., 1:], 0.0)
    eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    u = torch.linalg.solve_triangular(system.tril(-1) + eye, theta * (v - known), upper=False, unitriangular=True)
    outputs = [
        sum(x * (q @ part) for x, part in zip(worth, carried, strict=True)) + ((q @ k.mT) * reach[..., 1:]) @ u
        for q in queries
    ]
    kept = sum(x[..., -1:, :] * part for x, part in zip(worth, carried, strict=True))
    last = [kept + k.mT @ (reach[..., -1, 1:, None] * u)]
    if momentum is not None:
        last.append(momentum[..., -1:, :1] * carried[1] + k.mT @ (momentum[..., -1, 1:, None] * u))
    return outputs, torch.stack(last, 2)


def _products(logs: Tensor) -> Tensor:
    """(B, H, C) → (B, H, C, C + 1): the product over the tokens after origin j up to t; 0 where j comes later."""
    sums = F.pad(logs.double().cumsum(-1), (1, 0))
    between = (sums[..., 1:, None] - sums[..., None, :]).to(logs.dtype)
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=logs.device).triu(2)
    return between.masked_fill(later, -torch.inf).exp()


def _delay(x: Tensor, first: float) -> Tensor:
    """The same, one token earlier."""
    return torch.cat((torch.full_like(x[:, :, :1], first), x[:, :, :-1]), 2)


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-12).rsqrt()


@dataclass(frozen=True)
class CacheState:
    """What a row's cache holds: of closed segments keys and values (H, N, L, K), log importance (H, N, L) and the
    weight that all queries gave them (H, N); of the open segment its tokens' content (t, H, ·) and scores (t, H, L),
    and the segments (H, R) that its first token chose."""

    keys: Tensor
    values: Tensor
    bias: Tensor
    access: Tensor
    content: Tensor
    scores: Tensor
    chosen: Tensor | None = None

    @property
    def segments(self) -> int:
        return self.keys.shape[1]


class DifferentiableCache(nn.Module):
    """Latents pooled from past segments, read by attention with importance and a null slot."""

    def __init__(self, config: VishwamaiConfig) -> None:
        super().__init__()
        assert config.cache
        options = config.cache
        width, self.heads = config.hidden_size, options["heads"]
        self.head_dim, self.latents = width // self.heads, options["latents_per_segment"]
        self.segment_length, self.retrieve = options["segment_length"], options["retrieve_segments"]
        self.capacity, self.factor = options["max_segments"], options["retrieval_factor"]
        self.dropout = options["dropout"]
        self.content = 2 * self.head_dim + IMPORTANCE_WIDTH
        self.norm = MistralRMSNorm(width, eps=config.rms_norm_eps)
        self.projection = nn.Linear(width, self.heads * (self.head_dim + self.content + self.latents), bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(self.heads * self.latents * self.segment_length))
        self.importance_weight = nn.Parameter(torch.full((self.heads * IMPORTANCE_WIDTH,), 1 / IMPORTANCE_WIDTH))
        self.importance_bias = nn.Parameter(torch.zeros(self.heads))
        self.null_key = nn.Parameter(torch.zeros(width))

    def forward(
        self, hidden: Tensor, padding: Tensor | None, states: list[CacheState] | None
    ) -> tuple[Tensor, list[CacheState]]:
        """Add what the cache holds for each token; arguments as of `NeuralMemory.forward`, a state for each row."""
        projected = self.projection(self.norm(hidden)).unflatten(-1, (self.heads, -1)).float()
        read, after = [], []
        for row, tokens in enumerate(projected):
            skipped = 0 if padding is None else int(padding[row])
            out, state = self._row(tokens[skipped:], states[row] if states else None)
            read.append(F.pad(out, (0, 0, 0, 0, skipped, 0)))
            after.append(state)
        out = self.output(torch.stack(read).flatten(-2).to(hidden.dtype))
        return hidden + self.factor * F.dropout(out, self.dropout, self.training), after

    def _row(self, tokens: Tensor, state: CacheState | None) -> tuple[Tensor, CacheState]:
        """One row, (T, H, ·) → (T, H, K), segment by segment."""
        query, content, scores = tokens.split([self.head_dim, self.content, self.latents], -1)
        evicts_last = state is None and len(tokens) >= self.segment_length  # a whole text is read as in training
        state = state or self._empty(content, scores)
        out = []
        first = 0
        while first < len(tokens):
            piece = slice(first, first + self.segment_length - len(state.content))
            read, state = self._read(query[piece], state)
            out.append(read)
            state = self._append(content[piece], scores[piece], state)
            if not evicts_last:
                state = self._evict(state)
            first = piece.stop
        return torch.cat(out) if out else query, self._evict(state)

    def _empty(self, content: Tensor, scores: Tensor) -> CacheState:
        keys = content.new_zeros(self.heads, 0, self.latents, self.head_dim)
        return CacheState(keys, keys, keys[..., 0], keys[..., 0, 0], content[:0], scores[:0])

    def _read(self, query: Tensor, state: CacheState) -> tuple[Tensor, CacheState]:
        """Tokens of the open segment, (t, H, K)."""
        if state.segments == 0:
            return torch.zeros_like(query), state
        q = query.transpose(0, 1) / math.sqrt(self.head_dim)
        logits = (q @ state.keys.flatten(1, 2).mT).unflatten(-1, (state.segments, -1)) + state.bias[:, None]
        if state.segments > self.retrieve:
            visible, state = self._choose(q, state)
            logits = logits.masked_fill(~visible[..., None], -torch.inf)
        null = (q * self.null_key.float().view(self.heads, 1, -1)).sum(-1, keepdim=True)
        weights = torch.cat((null, logits.flatten(-2)), -1).softmax(-1)[..., 1:]
        access = state.access + weights.detach().sum(1).unflatten(-1, (state.segments, -1)).sum(-1)
        return (weights @ state.values.flatten(1, 2)).transpose(0, 1), replace(state, access=access)

    @torch.no_grad()
    def _choose(self, q: Tensor, state: CacheState) -> tuple[Tensor, CacheState]:
        """Which segments each token reads, (H, t, N): the best for the segment's first token, and its own best."""
        share = state.bias.softmax(-1)
        summaries = (share[..., None, :] @ state.keys)[..., 0, :]
        scores = q @ summaries.mT + state.bias.logsumexp(-1)[:, None]
        chosen = state.chosen
        if chosen is None:
            chosen = scores[:, 0].topk(self.retrieve).indices
        visible = torch.zeros_like(scores, dtype=torch.bool)
        visible.scatter_(-1, chosen[:, None].expand(-1, scores.shape[1], -1), True)
        visible.scatter_(-1, scores.argmax(-1, keepdim=True), True)
        return visible, replace(state, chosen=chosen)

    def _append(self, content: Tensor, scores: Tensor, state: CacheState) -> CacheState:
        """Take in tokens of the open segment; where they close it, pool it into latents."""
        content, scores = torch.cat((state.content, content)), torch.cat((state.scores, scores))
        if len(content) < self.segment_length:
            return replace(state, content=content, scores=scores)
        position = self.position_bias.float().view(self.heads, self.latents, -1)
        weights = (scores.permute(1, 2, 0) + position).softmax(-1)
        pooled = weights @ content.transpose(0, 1)
        key, value, hidden = pooled.split([self.head_dim, self.head_dim, IMPORTANCE_WIDTH], -1)
        weight = self.importance_weight.float().view(self.heads, 1, -1)
        bias = F.logsigmoid((F.silu(hidden) * weight).sum(-1) + self.importance_bias.float()[:, None])
        return CacheState(
            torch.cat((state.keys, key[:, None]), 1),
            torch.cat((state.values, value[:, None]), 1),
            torch.cat((state.bias, bias[:, None]), 1),
            F.pad(state.access, (0, 1)),
            content[:0],
            scores[:0],
        )

    def _evict(self, state: CacheState) -> CacheState:
        """Where there are too many, drop segments of least importance × use, a sixteenth at a time."""
        if state.segments <= self.capacity:
            return state
        worth = state.bias.exp().mean(-1) * (1 + state.access)
        stay = worth.topk(self.capacity - self.capacity // 16, dim=1).indices.sort(1).values
        head = torch.arange(self.heads, device=stay.device)[:, None]
        keys, values, bias, access = (x[head, stay] for x in (state.keys, state.values, state.bias, state.access))
        return CacheState(keys, values, bias, access, state.content, state.scores)


class VishwamaiCache(DynamicCache):
    """Keys and values, and what each layer's components know of the same tokens."""

    component_states: dict[tuple[int, str], Any]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.component_states = {}

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        layer: Any = self.layers[0]
        rows = layer.keys.shape[0]
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("memories and caches cannot take tokens back")

    def reset(self) -> None:
        super().reset()
        self.component_states = {}

    def _select(self, index: Tensor) -> None:
        for key, state in self.component_states.items():
            rows = [state[row] for row in index.tolist()] if isinstance(state, list) else state.rows(index)
            self.component_states[key] = rows


class VishwamaiDecoderLayer(MistralDecoderLayer):
    """A decoder layer with its components in front."""

    def __init__(self, config: VishwamaiConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        names = []
        if config.memory and layer_idx in config.memory["layers"]:
            self.memory = NeuralMemory(config)
            names.append("memory")
        if config.cache and layer_idx in config.cache["layers"]:
            self.cache = DifferentiableCache(config)
            names.insert(0 if config.cache["before_memory"] else len(names), "cache")
        self.component_names = names

    def forward(self, hidden_states: Tensor, *args: Any, padding: Tensor | None = None, **options: Any) -> Tensor:
        past = options.get("past_key_values")
        for name in self.component_names:
            states = {} if past is None else past.component_states
            key = (self.layer_idx, name)
            hidden_states, states[key] = getattr(self, name)(hidden_states, padding, states.get(key))
        return super().forward(hidden_states, *args, **options)


class VishwamaiPreTrainedModel(MistralPreTrainedModel):
    config_class = VishwamaiConfig
    _no_split_modules = ["VishwamaiDecoderLayer"]  # noqa: RUF012 (so transformers declares it)
    _can_compile_fullgraph = False
    _is_stateful = True  # no assisted generation: it takes tokens back
    _can_record_outputs = {"hidden_states": VishwamaiDecoderLayer, "attentions": MistralAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NeuralMemory | DifferentiableCache):
            nn.init.zeros_(module.output.weight)


class VishwamaiModel(VishwamaiPreTrainedModel, MistralModel):
    def __init__(self, config: VishwamaiConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(VishwamaiDecoderLayer(config, number) for number in range(config.num_hidden_layers))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        tokens: Any = input_ids if input_ids is not None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.training and self.gradient_checkpointing):
            past_key_values = VishwamaiCache(config=self.config)
        if past_key_values is not None:
            _adopt(past_key_values)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            padding=_padding(attention_mask, seen, tokens.shape[1]),
            **options,
        )


def _adopt(past: Any) -> None:
    """Let a cache that `generate` or a caller made carry components' states too; it stays the object it is."""
    if isinstance(past, VishwamaiCache):
        return
    if type(past) is not DynamicCache or past.get_seq_length() > 0:
        raise ValueError(f"past_key_values={type(past).__name__}: use an empty DynamicCache or a VishwamaiCache")
    past.__class__ = VishwamaiCache
    setattr(past, "component_states", {})  # noqa: B010 (to a type checker it is a DynamicCache still)


def _padding(attention_mask: Tensor | None, seen: int, tokens: int) -> Tensor | None:
    """(B,) how many of the new tokens are padding at a row's beginning; None: none of any row."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError("attention_mask: give one number per token, (rows, tokens)")
    absent = (attention_mask.cumsum(1) == 0).sum(1)
    padding = (absent - seen).clamp(0, tokens)
    return padding if bool(padding.any()) else None


class ValueHead(nn.Module):
    """σ(w · h + b): how well the text will go on from here."""

    def __init__(self, config: VishwamaiConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.weight.float() + self.bias.float()).sigmoid()


class VishwamaiForCausalLM(VishwamaiPreTrainedModel, MistralForCausalLM):
    def __init__(self, config: VishwamaiConfig) -> None:
        super().__init__(config)
        self.model = VishwamaiModel(config)
        if config.value_head:
            self.value_head = ValueHead(config)
        self.post_init()

    def values(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The value head's answer at each token, (B, T) in fp32."""
        return self.value_head(self.model(input_ids, attention_mask, use_cache=False).last_hidden_state)
