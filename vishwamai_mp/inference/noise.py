"""Random numbers that are a function of a name: Gumbel noise from the Philox generator.

A number is named by (seed, stream, position, token id), so it is the same on whichever rank, in whichever batch and
order it is drawn. Shapes: B rows, K ids per row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox(counter: list[Tensor], key: list[Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 (Salmon et al., doi 10.1145/2063384.2063405): four 32-bit words from a counter and a key.

    Args:
        counter: four int64 tensors of words below 2³²; they broadcast.
        key: two of the same.

    Returns:
        four int64 tensors of words below 2³².
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(rounds):
        # An int64 product wraps, which leaves all its 64 bits as they should be.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = ((right >> 32) & _MASK) ^ b ^ k0, ((left >> 32) & _MASK) ^ d ^ k1
        b, d = right & _MASK, left & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [a, b, c, d]


@dataclass(frozen=True)
class NoiseNames:
    """What names the noise of each row, besides the token id. Integers from 0 on, (B,)."""

    seed: Tensor
    stream: Tensor
    position: Tensor

    @classmethod
    def of(cls, names: list[tuple[int, int, int]], device: torch.device) -> "NoiseNames":
        """From (seed, stream, position) of each row."""
        return cls(*torch.tensor(names, dtype=torch.int64, device=device).view(-1, 3).unbind(1))

    def rows(self, index: Tensor) -> "NoiseNames":
        return NoiseNames(self.seed[index], self.stream[index], self.position[index])

    def over_range(self, first: int, count: int) -> Tensor:
        """Standard Gumbel noise of the ids from `first` (a multiple of 4) on: fp32, (B, count)."""
        assert first % 4 == 0
        groups = torch.arange(first // 4, (first + count + 3) // 4, device=self.seed.device)
        words = torch.stack(self._words(groups[None]), -1)  # four ids share a counter
        return _gumbel(words.flatten(1)[:, :count])

    def at(self, ids_BK: Tensor) -> Tensor:
        """Standard Gumbel noise of these ids: fp32, (B, K)."""
        words = torch.stack(self._words(ids_BK // 4), -1)
        return _gumbel(words.gather(-1, (ids_BK % 4)[..., None])[..., 0])

    def _words(self, groups: Tensor) -> list[Tensor]:
        seed, stream, position = (x[:, None] for x in (self.seed, self.stream, self.position))
        counter = [groups, position, stream & _MASK, stream >> 32]
        return philox(counter, [seed & _MASK, seed >> 32])


def _gumbel(words: Tensor) -> Tensor:
    # −log(−log u) with u = 1 − v: fp32 resolves small v, and small v is where the large values come from.
    v = ((words.double() + 0.5) * 2.0**-32).float().clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()
