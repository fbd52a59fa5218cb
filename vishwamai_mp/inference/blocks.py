"""Keys and values in reference-counted blocks, shared between sequences that start alike.

Shapes: L layers of this stage, G key-value heads (local), T tokens of a block, K head width.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.config import UserError

BLOCK_TOKENS = 16


@dataclass
class KvSequence:
    """What the model has read of one sequence.

    Attributes:
        length: tokens read.
        blocks: where their keys and values are, in order.
        states: of components, by (layer, name): immutable values, shared by forks.
        frequency_length: of the rotary frequencies that its keys were turned with (`model.rotary`).
        revocable: of each component, its states after the last tokens, newest last, where these were only guessed.
    """

    length: int = 0
    blocks: list[int] = field(default_factory=list)
    states: dict[tuple[int, str], Any] = field(default_factory=dict)
    frequency_length: int = 0
    revocable: dict[tuple[int, str], list[Any]] = field(default_factory=dict)


class BlockPool:
    """Blocks of 16 tokens for the layers of this stage: `keys_and_values`, (L, blocks, G, 2, T, K).

    Args:
        tokens: capacity.
        layers, heads, width: L, G and K.
        dtype, device: of keys and values.
    """

    def __init__(
        self, tokens: int, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = -(-tokens // BLOCK_TOKENS)
        # Memory that no block uses yet is not touched, so on a CPU it costs nothing.
        self.keys_and_values = torch.empty(
            layers, self.capacity, heads, 2, BLOCK_TOKENS, width, dtype=dtype, device=device
        )
        self._references = [0] * self.capacity
        self._free: list[int] = []
        self._touched = 0

    @property
    def used_blocks(self) -> int:
        return self._touched - len(self._free)

    @property
    def free_blocks(self) -> int:
        return self.capacity - self.used_blocks

    @property
    def used_bytes(self) -> int:
        """2 · layers · heads · width · bytes per number, for 16 tokens of each block in use."""
        return self.used_blocks * self._block(0).nbytes

    def extend(self, sequence: KvSequence, count: int) -> None:
        """Make room for `count` more tokens. A partly filled block that is shared is copied.

        Raises:
            UserError: no block is free. The sequence then is as before.
        """
        end = sequence.length + count
        needed = -(-end // BLOCK_TOKENS) - len(sequence.blocks)
        last = sequence.blocks[sequence.length // BLOCK_TOKENS] if sequence.length % BLOCK_TOKENS else None
        copies = last is not None and self._references[last] > 1
        if needed + copies > self.free_blocks:
            raise UserError(
                f"the key-value pool of {self.capacity * BLOCK_TOKENS} tokens is full; raise kv_tokens, or generate"
                " fewer or shorter sequences at a time"
            )
        if last is not None and copies:
            own = self._take()
            self._block(own).copy_(self._block(last))
            self._drop(last)
            sequence.blocks[-1] = own
        sequence.blocks.extend(self._take() for _ in range(needed))

    def fork(self, sequence: KvSequence) -> KvSequence:
        """Another sequence that starts with the same tokens. Nothing is copied until one of them writes."""
        for block in sequence.blocks:
            self._references[block] += 1
        return replace(sequence, blocks=list(sequence.blocks), states=dict(sequence.states), revocable={})

    def take_back(self, sequence: KvSequence, count: int) -> None:
        """Forget the last `count` tokens, guessed in the last pass, and give back the blocks that they needed."""
        sequence.length -= count
        needed = -(-sequence.length // BLOCK_TOKENS)
        for block in sequence.blocks[needed:]:
            self._drop(block)
        del sequence.blocks[needed:]
        sequence.states |= {component: states[-1 - count] for component, states in sequence.revocable.items()}
        sequence.revocable = {}

    def release(self, sequence: KvSequence) -> None:
        """Give back what only this sequence used. It is empty then."""
        for block in sequence.blocks:
            self._drop(block)
        sequence.length, sequence.blocks, sequence.frequency_length = 0, [], 0
        sequence.states, sequence.revocable = {}, {}

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = self._touched
            self._touched += 1
            self._block(block).zero_()  # attention gives unwritten places no weight, and 0 · NaN would be NaN
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free.append(block)

    def _block(self, block: int) -> Tensor:
        return self.keys_and_values[:, block]
