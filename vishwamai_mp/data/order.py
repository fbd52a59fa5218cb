"""Which sample comes when: pure functions of a sample's number.

Nothing here depends on how long the run is, how many processes it has or where it resumed; so a run that is prolonged
or laid out anew keeps its order.
"""

from collections.abc import Sequence

import numpy as np

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from megatron.core.datasets import helpers

_BLOCK = 2**18  # samples after which the interleaving of weighted sources repeats; resolves weights to 4e-6
_MASK64 = 2**64 - 1


class Interleaving:
    """Draws from several sources in fixed proportions, as evenly as can be.

    A block of samples, in which each source has a whole number, is ordered by megatron-core's blending and then
    repeated: memory stays that of one block, however long the run.
    """

    def __init__(self, weights: Sequence[float] | None, sizes: Sequence[int]) -> None:
        """Lay out one block.

        Args:
            weights: proportions of the sources, in samples, all positive; None: their `sizes`, so that all end their
                epochs together.
            sizes: samples in one epoch of each source.
        """
        counts = _apportion(_BLOCK if weights else min(_BLOCK, sum(sizes)), weights or sizes)
        self.counts = np.maximum(counts, 1)  # the builder below never ends on a source without a sample
        block = int(self.counts.sum())
        self._source = np.zeros(block, dtype=np.int16)
        self._sample = np.zeros(block, dtype=np.int64)
        helpers.build_exhaustive_blending_indices(self._source, self._sample, self.counts, len(sizes))

    def __call__(self, index: int) -> tuple[int, int]:
        """The source that sample `index` of the blend comes from, and its number in that source (over all epochs)."""
        block, within = divmod(index, len(self._source))
        source = int(self._source[within])
        return source, block * int(self.counts[source]) + int(self._sample[within])

    @property
    def shares(self) -> list[float]:
        """The fraction of samples that comes from each source."""
        return [float(count / self.counts.sum()) for count in self.counts]


def _apportion(total: int, weights: Sequence[float]) -> np.ndarray:
    """Whole numbers in proportion to `weights` that sum to `total` (largest remainders)."""
    quotas = total * np.asarray(weights, dtype=np.float64) / sum(weights)
    counts = np.floor(quotas).astype(np.int64)
    largest_first = np.argsort(counts - quotas, kind="stable")
    counts[largest_first[: total - counts.sum()]] += 1
    return counts


def permute(index: int, size: int, key: int) -> int:
    """Where `index` lies in the permutation of range(size) that `key` names; needs no memory.

    Four Feistel rounds permute the next power of four; a value outside the range is permuted again.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(4 * right + turn, key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int, key: int) -> int:
    """A well-mixed 64-bit function of `value` and `key` (the finaliser of SplitMix64, doi 10.1145/2714064.2660195)."""
    value = (value + key * 0x9E3779B97F4A7C15) & _MASK64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31
