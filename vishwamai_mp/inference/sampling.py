"""Choosing tokens from vocabulary-parallel logits without gathering them.

The choice is the same at every tensor parallel size: candidates are ordered by (logit descending, id ascending), and
random numbers are functions of (seed, position, row, token id). Shapes: B rows, V vocabulary (local, padded).
"""

import torch
import torch.distributed as dist
from torch import Tensor

_GOLDEN, _MULTIPLIERS = -7046029254386353131, ((30, -4658895280553007687), (27, -7723592293110705685))
_LOW_63 = 2**63 - 1


def choose(
    logits_BV: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    position: int = 0,
) -> Tensor:
    """Pick one token per row.

    Args:
        logits_BV: this rank's shard; padding ids are never chosen.
        vocab_size: real tokens.
        group: the tensor parallel group.
        temperature: 0 takes the most likely token; above, samples from softmax(logits / temperature).
        top_k: sample among this many most likely tokens.
        seed, position: name the random numbers; `position` is the token's place in the sequence.

    Returns:
        token ids, (B,), equal on all ranks. Communicates k·TP (value, id) pairs per row, whatever V is.
    """
    first = group.rank() * logits_BV.shape[1]
    ids = torch.arange(first, first + logits_BV.shape[1], device=logits_BV.device)
    values = logits_BV.double().masked_fill(ids >= vocab_size, -torch.inf)
    ids = ids.expand_as(values)
    if temperature == 0:
        return _best(values, ids, 1, group)[1][:, 0]
    if top_k is not None:
        values, ids = _best(values, ids, top_k, group)
    scores = values / temperature + _gumbel(seed, position, ids)  # Gumbel-max: its argmax is a sample
    return _best(scores, ids, 1, group)[1][:, 0]


def _best(values: Tensor, ids: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The `count` largest over all ranks' columns, ties to the lower id: values and ids, (B, ≤count)."""
    # Columns are in order of id on every rank, so a stable sort keeps ties in that order.
    top, order = values.sort(dim=-1, descending=True, stable=True)
    top, ids = top[:, :count].contiguous(), ids.gather(-1, order[:, :count])
    if group.size() > 1:
        all_top = [torch.empty_like(top) for _ in range(group.size())]
        all_ids = [torch.empty_like(ids) for _ in range(group.size())]
        dist.all_gather(all_top, top, group=group)
        dist.all_gather(all_ids, ids.contiguous(), group=group)
        top, ids = torch.cat(all_top, -1), torch.cat(all_ids, -1)
        by_id = ids.argsort(dim=-1, stable=True)
        top, ids = top.gather(-1, by_id), ids.gather(-1, by_id)
        top, order = top.sort(dim=-1, descending=True, stable=True)
        top, ids = top[:, :count], ids.gather(-1, order[:, :count])
    return top, ids


def _gumbel(seed: int, position: int, ids_BV: Tensor) -> Tensor:
    """Standard Gumbel noise, a function of (seed, position, row, id) alone. float64, (B, V)."""
    rows = torch.arange(ids_BV.shape[0], device=ids_BV.device)[:, None]
    key = _mix(_mix(rows + _wrap(seed * 1_000_003)) + position)
    bits = _mix(key + ids_BV) & ((1 << 52) - 1)
    uniform = (bits.double() + 0.5) / (1 << 52)
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (doi 10.1145/2714064.2660195) on int64, whose products wrap as they should."""
    x = x + _GOLDEN
    for shift, multiplier in _MULTIPLIERS:
        x = (x ^ _shift_right(x, shift)) * multiplier
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Logical shift; torch's is arithmetic."""
    return (x >> count) & (_LOW_63 >> (count - 1))


def _wrap(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
