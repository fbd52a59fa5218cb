"""The momentum gated delta rule, one token after the other: what decodes."""

import torch
from torch import Tensor

from vishwamai_mp.neural_memory.chunks import unit


def step(
    reads: list[Tensor],
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    state: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Write one token and read after it; `delta_rule.momentum_delta_rule` for T = 1.

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
