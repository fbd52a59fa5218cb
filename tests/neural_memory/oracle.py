"""The memory's rule written down as it is defined, token by token, for autograd to differentiate."""

import torch
from torch import Tensor


def recur(
    reads: list[Tensor],
    keys: Tensor,
    values: Tensor,
    log_forget: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    starts: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`momentum_delta_rule` without chunks."""
    length, batch, heads, width = keys.shape
    parts = 1 if log_momentum is None else 2
    if state is None:
        state = values.new_zeros(batch, heads, parts, width, values.shape[-1])
    memory, momentum = state[:, :, 0], state[:, :, parts - 1]
    surprise = values.new_zeros(())
    outputs: list[list[Tensor]] = [[] for _ in reads]
    for t in range(length):
        if starts is not None:
            kept = (~starts[t])[:, None, None, None]
            memory, momentum = memory * kept, momentum * kept
        k = _unit(keys[t])
        update = rate[t][..., None] * (values[t] - torch.einsum("bhk,bhkv->bhv", k, memory))
        surprise = surprise + update.square().sum()
        write = torch.einsum("bhk,bhv->bhkv", k, update)
        momentum = write if log_momentum is None else log_momentum[t].exp()[..., None, None] * momentum + write
        memory = log_forget[t].exp()[..., None, None] * memory + momentum
        for output, read in zip(outputs, reads, strict=True):
            output.append(torch.einsum("bhk,bhkv->bhv", _unit(read[t]), memory))
    final = [memory] if log_momentum is None else [memory, momentum]
    return [torch.stack(output) for output in outputs], torch.stack(final, 2), surprise


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-12).sqrt()
