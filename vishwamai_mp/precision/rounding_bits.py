"""Random bits of stochastic rounding: a function of seed, step, layer and place, whatever the layout.

A number's bits are a hash of the run's seed, the step, the linear layer, the direction (gradients are rounded once for
each product), the token's sample in the step's global batch, its position in the sequence, and the output's number in
the whole model. So a resumed run draws what it would have drawn, and each rank draws for its part what one process
draws for the whole; what tensors that are split still differ by is their scales.
"""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from vishwamai_mp.precision.formats import CHANCE_BITS
from vishwamai_mp.runtime.zigzag import local_positions

# A hash of 32 bits: two rounds of folding and of multiplying by odd numbers. int32 shifts copy the sign, so that a fold
# clears the highest bit; the lower half stays as good.
_ROUNDS = ((16, 0x21F0AAAD), (15, 0x735A2D97))
_LAST_SHIFT = 15


class RoundingBits:
    """The bits of one gradient's numbers.

    Args:
        key: of layer, step and direction: `layer_key`.
        samples_M: each row's sample.
        positions_M: each row's position in the sequence.
        outputs_N: each column's output.
    """

    def __init__(self, key: int, samples_M: Tensor, positions_M: Tensor, outputs_N: Tensor) -> None:
        rows = _scattered(_scattered(samples_M.long() + (key >> 32)) + positions_M.long())
        self._rows, self._columns = _folded(rows), _folded(_scattered(outputs_N.long() + (key & 0xFFFFFFFF)))

    def of_rows(self, rows: slice) -> Tensor:
        """Of some rows: numbers below 2^16, int32, (rows, N)."""
        bits = self._rows[rows, None] ^ self._columns
        for shift, factor in _ROUNDS:
            bits ^= bits >> shift
            bits *= factor
        return bits.bitwise_xor_(bits >> _LAST_SHIFT).bitwise_and_((1 << CHANCE_BITS) - 1)


class GradientPlaces:
    """Where the numbers of a linear layer's gradients stand in the whole: sample, position and output.

    Args:
        outputs_N: the number in the whole model of each of this rank's outputs.
        context: context parallel ranks, which share out positions.
        data: data parallel ranks, which share out samples.
    """

    def __init__(self, outputs_N: Tensor, context: dist.ProcessGroup, data: dist.ProcessGroup) -> None:
        self.outputs_N, self.context, self.data = outputs_N, context, data

    def of_pass(self, number: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Samples and positions, one a row, and outputs, one a column, of a gradient (T, B, O).

        Args:
            number: of the layer's backward pass within the step, from 0. They come in the order of micro-batches.
            shape: of the gradient, of the whole sequence of a context parallel rank.
        """
        tokens, batch = shape[0], shape[1:-1].numel()
        size, rank = self.context.size(), self.context.rank()
        # An odd number is no part of a sequence that was dealt out; then any numbers that others do not have.
        odd = tokens % 2 == 1
        here = self.outputs_N.device
        if odd:
            positions = torch.arange(tokens, device=here) + rank * tokens
        else:
            positions = local_positions(tokens * size, rank, size, here)
        samples = torch.arange(batch, device=here) + (number * self.data.size() + self.data.rank()) * batch
        return samples.repeat(tokens), positions.repeat_interleave(batch), self.outputs_N


def layer_key(seed: int, step: int, layer: str, direction: str) -> int:
    """64 bits that a layer's numbers follow from."""
    digest = hashlib.blake2b(f"{seed}/{step}/{layer}/{direction}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _scattered(x: Tensor) -> Tensor:
    """int64 numbers spread over their range, one to one; torch's products wrap around."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> 31)


def _folded(x: Tensor) -> Tensor:
    """int64 to int32."""
    return (x ^ (x >> 32)).to(torch.int32)
