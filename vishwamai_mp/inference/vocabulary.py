"""Exact choices over vocabulary-parallel logits, which are never gathered.

What travels between tensor parallel ranks is a few numbers per row, whatever the vocabulary. Results are bitwise the
same at every tensor parallel size, given the same logits: tokens are ordered by (value descending, id ascending), sums
over the vocabulary are sums of integers, noise is a function of the token's id.

Shapes: B rows, V vocabulary (local, padded), K candidates.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.inference.noise import NoiseNames

_ONE = 40  # exp(0) is 2⁴⁰ in the sums: a vocabulary of 2²⁰ still fits an int64, and fp32 terms lose nothing that counts
_LOW = 0xFFFFFFFF
_LEAST = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class Shard:
    """This rank's part of the logits: fp32 (B, V) of the ids from `first` on, −∞ where an id is padding."""

    values: Tensor
    first: int
    vocab_size: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, logits_BV: Tensor, vocab_size: int, group: dist.ProcessGroup) -> "Shard":
        """From this rank's logits; `vocab_size` counts real tokens, the ids beyond are never chosen."""
        first = group.rank() * logits_BV.shape[1]
        padding = first + logits_BV.shape[1] - vocab_size
        values = logits_BV.float().contiguous()
        if padding > 0:
            # A copy, as wide as before: whole vectors of numbers round alike, a remainder might not.
            values = values.clone() if values is logits_BV else values
            values[:, max(0, values.shape[1] - padding) :] = -torch.inf
        return cls(values, first, vocab_size, group)

    def like(self, values: Tensor) -> "Shard":
        """The same ids with other values."""
        return Shard(values, self.first, self.vocab_size, self.group)

    def rows(self, index: Tensor) -> "Shard":
        return self.like(self.values[index])

    @cached_property
    def _masses(self) -> tuple[Tensor, Tensor]:
        """The largest value of each row, and Σ exp(value − largest) as an integer multiple of 2⁻⁴⁰. (B,)"""
        highest = self.values.amax(-1)
        if self.group.size() > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        mass = _integer_mass(self.values, highest[:, None]).sum(-1)
        if self.group.size() > 1:
            dist.all_reduce(mass, group=self.group)
        return highest, mass

    @property
    def highest(self) -> Tensor:
        """The largest value of each row, (B,). Not finite where the model's output is not."""
        return self._masses[0]

    @property
    def mass(self) -> Tensor:
        """Σ exp(value − highest) in units of 2⁻⁴⁰, int64 (B,): exact, so any split of the vocabulary gives the same."""
        return self._masses[1]

    def log_normaliser(self) -> Tensor:
        """log Σ exp(value), fp32 (B,)."""
        return self.highest + (self.mass.double().log() - _ONE * torch.tensor(2.0, dtype=torch.float64).log()).float()

    def log_probs(self, ids_BK: Tensor) -> Tensor:
        """log softmax at these ids, fp32 (B, K), on all ranks."""
        local = ids_BK - self.first
        outside = (local < 0) | (local >= self.values.shape[1])
        picked = self.values.gather(1, local.masked_fill(outside, 0)).masked_fill(outside, 0.0)
        if self.group.size() > 1:
            dist.all_reduce(picked, group=self.group)  # one rank has the value, the others zero
        return picked - self.log_normaliser()[:, None]

    def best(self) -> tuple[Tensor, Tensor]:
        """The largest value of each row and its id, ties to the lower id. (B,) each."""
        values, columns = self.values.max(-1)  # the first of equals
        if self.group.size() == 1:
            return values, columns + self.first
        keys = _keys(values, columns + self.first)
        dist.all_reduce(keys, dist.ReduceOp.MAX, group=self.group)
        return _open(keys)

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest of each row, ordered: values fp32 and ids, (B, min(count, vocabulary)).

        The best of all lie among the best of the shards, so each rank sends `count` keys of 8 bytes per row.
        """
        count = min(count, self.vocab_size)
        ids = torch.arange(self.first, self.first + self.values.shape[1], device=self.values.device)
        keys = _keys(self.values, ids)
        keys = keys.topk(min(count, keys.shape[1]), dim=-1)[0]
        if self.group.size() > 1:
            short = count - keys.shape[1]
            if short:
                keys = torch.nn.functional.pad(keys, (0, short), value=_LEAST)
            parts = [torch.empty_like(keys) for _ in range(self.group.size())]
            dist.all_gather(parts, keys.contiguous(), group=self.group)
            keys = torch.cat(parts, -1).topk(count, dim=-1)[0]
        return _open(keys)


def sample(shard: Shard, temperature: float, names: NoiseNames) -> Tensor:
    """One id per row from softmax(values / temperature), (B,): the largest after adding Gumbel noise."""
    return _perturbed(shard, temperature, names).best()[1]


def sample_distinct(shard: Shard, temperature: float, names: NoiseNames, count: int) -> Tensor:
    """Different ids, drawn one after the other without replacement (Gumbel-top-k, arXiv 1903.06059). (B, ≤ count)"""
    return _perturbed(shard, temperature, names).top(count)[1]


def sample_among(
    shard: Shard,
    temperature: float,
    names: NoiseNames,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """One id per row from what the filters leave, applied in this order.

    Args:
        shard: logits.
        temperature: logits are divided by it first.
        names: of the noise.
        top_k: the likeliest `top_k`.
        top_p: the fewest likeliest that have this share of what is left.
        min_p: those at least this fraction as likely as the likeliest.

    Returns:
        ids, (B,).
    """
    scaled = shard.like(_divided(shard.values, temperature))
    if top_k is None and top_p is None:
        assert min_p is not None
        least = scaled.highest + torch.tensor(min_p, device=scaled.values.device).log()
        kept = scaled.values.masked_fill(scaled.values < least[:, None], -torch.inf)
        return sample(shard.like(kept), 1.0, names)
    values, ids = _nucleus(scaled, top_k, top_p)
    if min_p is not None:
        least = values[:, :1] + torch.tensor(min_p, device=values.device).log()
        values = values.masked_fill(values < least, -torch.inf)
    noisy = values + names.at(ids)
    # Equal scores go to the first column, which here need not be the lower id: so compare keys.
    return _open(_keys(noisy, ids).amax(-1))[1]


def penalise_repetition(shard: Shard, seen_BK: Tensor, penalty: Tensor) -> Shard:
    """Divide positive and multiply negative values of seen ids by `penalty` (arXiv 1909.05858).

    Args:
        shard: logits.
        seen_BK: ids, filled up with −1.
        penalty: (B,); 1 changes nothing.
    """
    local = seen_BK - shard.first
    outside = (local < 0) | (local >= shard.values.shape[1])
    local = local.masked_fill(outside, 0)
    seen = torch.zeros_like(shard.values, dtype=torch.int32).scatter_add_(1, local, (~outside).int()) > 0
    factor = penalty[:, None].clamp(1e-15, 1e15)  # far from where fp32 has infinities
    penalised = torch.where(shard.values > 0, shard.values / factor, shard.values * factor)
    return shard.like(torch.where(seen, penalised, shard.values))


def _nucleus(scaled: Shard, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Candidates in order, those that the filters drop at −∞. (B, K)"""
    if top_p is None:
        assert top_k is not None
        return scaled.top(top_k)
    count = top_k or 64
    while True:
        values, ids = scaled.top(count)
        masses = _integer_mass(values, values[:, :1])
        total = masses.sum(-1) if top_k else scaled.mass
        needed = (total.double() * top_p).ceil()[:, None]
        before = masses.cumsum(-1) - masses
        if top_k or ids.shape[1] == scaled.vocab_size or bool((before[:, -1:] + masses[:, -1:] >= needed).all()):
            return values.masked_fill(before >= needed, -torch.inf), ids
        count *= 2


def _perturbed(shard: Shard, temperature: float, names: NoiseNames) -> Shard:
    noise = names.over_range(shard.first, shard.values.shape[1])
    # Not fused into one multiply-add, which kernels round differently at the end of a row.
    return shard.like(noise.add_(shard.values if temperature == 1 else _divided(shard.values, temperature)))


def _divided(values: Tensor, temperature: float) -> Tensor:
    """Logits at a temperature. At 1e-30 the likeliest has all there is already, at 1e30 all are alike; beyond, fp32
    would have infinities, and NaN of ids that are never generated."""
    return values / min(max(temperature, 1e-30), 1e30)


def _integer_mass(values: Tensor, highest: Tensor) -> Tensor:
    return ((values - highest).exp_() * 2.0**_ONE).long()


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 numbers ordered as (value ascending, id descending), from which both can be read."""
    bits = (values + 0.0).view(torch.int32)  # + 0 makes −0 equal to 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (_LOW - ids)


def _open(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).int()
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32), _LOW - (keys & _LOW)
