"""The momentum gated delta rule in chunks, exactly: the memory's training form, with its own backward pass.

Per token t, with decays α (forget) and η (momentum) and a rate θ:

    u_t = θ_t (v_t − M_{t−1}ᵀ k_t)      S_t = η_t S_{t−1} + k_t u_tᵀ      M_t = α_t M_{t−1} + S_t      o_t = M_tᵀ q_t

A step of gradient descent on ½‖Mᵀk − v‖² at every token, with momentum and forgetting (Titans, arXiv 2501.00663,
section 3.1; chunks after arXiv 2412.06464, section 3.3). Every M_t of a chunk is a sum over the state carried into it
and over the chunk's own k_i u_iᵀ, so the u of a chunk solve one unit lower triangular system. What is local to a chunk
is computed for many chunks at once (`chunks.py`); two small products per chunk remain sequential.

Shapes: T tokens, B batch, H heads, K key width, V value width, N chunks of a group, C tokens of a chunk, E = B·H,
R reads per token, P parts of the state: M and S, or M alone without momentum.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.neural_memory.chunks import Group, Inputs, unit
from vishwamai_mp.neural_memory.delta_rule_on_gpu import DeltaRuleOnGpu, supports

_GROUP_TOKENS = 512  # whose chunk-local terms are held at once; the state is kept once per group for backward


def momentum_delta_rule(
    reads: Sequence[Tensor],
    keys: Tensor,
    values: Tensor,
    log_forget: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Write every token into the memory and read it after each.

    Args:
        reads: R tensors, each (T, B, H, K); q is their direction.
        keys: (T, B, H, K); k is their direction: ‖k‖ = 1 (0 for keys of 0).
        values: v, (T, B, H, V).
        log_forget: ln α, (T, B, H), finite.
        log_momentum: ln η, (T, B, H), finite; None: S_t is k_t u_tᵀ alone, and the state has one part.
        rate: θ, (T, B, H).
        starts: (T, B) bool, True at a document's first token, which finds an empty memory; None: nowhere.
        state: (B, H, P, K, V) before the first token; None: empty.
        chunk_size: C. Changes speed and memory, not results.

    Returns:
        R tensors o, (T, B, H, V) in the values' dtype; the state after the last token, fp32 (fp64 for fp64 values);
        Σ‖u‖² over all tokens, batch elements and heads, which has no gradient.
    """
    if state is None:
        state = empty_state(keys, values, momentum=log_momentum is not None)
    rule = DeltaRuleOnGpu if supports(reads, keys, values) else _DeltaRule
    final, surprise, *outputs = rule.apply(
        chunk_size, starts, state, keys, values, log_forget, log_momentum, rate, *reads
    )
    return outputs, final, surprise


def empty_state(keys: Tensor, values: Tensor, momentum: bool) -> Tensor:
    """The memory before the first token, (B, H, P, K, V), for keys and values shaped (T, B, H, ·)."""
    shape = (*keys.shape[1:3], 2 if momentum else 1, keys.shape[-1], values.shape[-1])
    return torch.zeros(shape, dtype=_precise(values), device=values.device)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk_size: int, starts: Tensor | None, state: Tensor, *tokens: Tensor | None) -> Any:
        values, reads = tokens[1], tokens[5:]
        assert values is not None
        outputs = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in reads]
        surprise = torch.zeros((), dtype=state.dtype, device=state.device)
        z = state.flatten(0, 1).flatten(1, 2)
        carried, kept = [], []
        for span, chunk in _groups(len(values), chunk_size):
            carried.append(z)
            group = _load(tokens, starts, span, chunk, state.dtype)
            updates, states = group.run(z)
            surprise += torch.dot(updates.flatten(), updates.flatten())
            for out, read in zip(outputs, group.read(updates, states).split(chunk, dim=2), strict=True):
                _store(out, read, span)
            kept.append(updates)
            z = states[-1].clone()  # alone: a view would keep all of them
        ctx.chunk_size, ctx.starts, ctx.carried, ctx.updates = chunk_size, starts, carried, kept
        ctx.save_for_backward(*tokens)
        ctx.mark_non_differentiable(surprise)
        ctx.set_materialize_grads(False)
        return z.view(state.shape), surprise, *outputs

    @staticmethod
    def backward(ctx: Any, d_final: Tensor | None, _: Any, *d_reads: Tensor | None) -> Any:
        tokens = ctx.saved_tensors
        values, state = tokens[1], ctx.carried[0]
        grads = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tokens]
        d_outputs = [torch.zeros_like(values) if grad is None else grad for grad in d_reads]
        d_z = torch.zeros_like(state) if d_final is None else d_final.reshape(state.shape)
        spans = list(_groups(len(values), ctx.chunk_size))
        for (span, chunk), z, u in zip(reversed(spans), reversed(ctx.carried), reversed(ctx.updates), strict=True):
            group = _load(tokens, ctx.starts, span, chunk, state.dtype)
            updates, states = group.run(z, u)
            d_out = _join(d_outputs, span, chunk, state.dtype)
            d_inputs, d_z = group.backward(updates, states, d_out, d_z)
            parts = (d_inputs.keys, d_inputs.values, d_inputs.log_forget, d_inputs.log_momentum, d_inputs.rate)
            for grad, part in zip(grads, (*parts, *d_inputs.reads.split(chunk, dim=2)), strict=True):
                if grad is not None and part is not None:
                    _store(grad, part, span)
        batch, heads = values.shape[1:3]
        d_state = d_z.view(batch, heads, -1, tokens[0].shape[-1], values.shape[-1])
        return None, None, d_state, *grads


def _precise(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _groups(length: int, chunk_size: int) -> Iterator[tuple[slice, int]]:
    """Groups of whole chunks, and what is left as one shorter chunk: their tokens and their chunk size."""
    whole = length - length % chunk_size
    step = max(1, _GROUP_TOKENS // chunk_size) * chunk_size
    for first in range(0, whole, step):
        yield slice(first, min(first + step, whole)), chunk_size
    if whole < length:
        yield slice(whole, length), length - whole


def _load(tokens: Sequence[Any], starts: Tensor | None, span: slice, chunk: int, dtype: torch.dtype) -> Group:
    """`tokens` are keys, values, ln α, ln η or None, θ, and the reads."""
    keys, values, log_forget, log_momentum, rate, *reads = tokens
    begins = None
    if starts is not None:
        begins = _cut(starts[..., None].expand(-1, -1, keys.shape[2]), span, chunk, torch.bool)
    inputs = Inputs(
        _join(reads, span, chunk, dtype),
        _cut(keys, span, chunk, dtype),
        _cut(values, span, chunk, dtype),
        _cut(log_forget, span, chunk, dtype),
        None if log_momentum is None else _cut(log_momentum, span, chunk, dtype),
        _cut(rate, span, chunk, dtype),
    )
    return Group(inputs, begins)


def _join(reads: Sequence[Tensor], span: slice, chunk: int, dtype: torch.dtype) -> Tensor:
    cuts = [_cut(read, span, chunk, dtype) for read in reads]
    return torch.cat(cuts, dim=2) if len(cuts) > 1 else cuts[0]


def _cut(x: Tensor, span: slice, chunk: int, dtype: torch.dtype) -> Tensor:
    """(T, B, H, …) → (N, E, C, …) of the tokens in `span`."""
    x = x[span].unflatten(0, (-1, chunk)).movedim(1, 3)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(1, 2)


def _store(out: Tensor, x: Tensor, span: slice) -> None:
    """Put (N, E, C, …) into its place in `out`, (T, B, H, …)."""
    part = out[span].unflatten(0, (len(x), -1))
    part.copy_(x.unflatten(1, out.shape[1:3]).movedim(3, 1))


def one_token(
    reads: list[Tensor],
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    state: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Write one token and read after it; `momentum_delta_rule` for T = 1, which decodes.

    Args:
        reads: each (B, H, K).
        key: (B, H, K).
        value: (B, H, V).
        log_forget: (B, H); so are `log_momentum` and `rate`.
        state: (B, H, P, K, V). Left as it is.

    Returns:
        each read's (B, H, V) in the value's dtype, and the next state.
    """
    k, v = unit(key.to(state.dtype))[0], value.to(state.dtype)
    memory = state[:, :, 0]
    surprise = rate[..., None] * (v - (k[..., None, :] @ memory).squeeze(-2))
    write = k[..., :, None] * surprise[..., None, :]
    if log_momentum is None:
        state = torch.addcmul(write, memory, _wide(log_forget))[:, :, None]
    else:
        momentum = torch.addcmul(write, state[:, :, 1], _wide(log_momentum))
        state = torch.stack((torch.addcmul(momentum, memory, _wide(log_forget)), momentum), dim=2)
    outputs = [(unit(q.to(state.dtype))[0][..., None, :] @ state[:, :, 0]).squeeze(-2).to(value.dtype) for q in reads]
    return outputs, state


def _wide(log_decay: Tensor) -> Tensor:
    return log_decay.exp()[..., None, None]
