"""Keys and values in reference-counted blocks, shared between sequences that start alike.

Shapes: L layers of this stage, G key-value heads (local), T tokens of a block, K head width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vishwamai_mp.config import UserError

BLOCK_TOKENS = 16
_MARK_TOKENS, _MOST_MARKS = 256, 16
States = dict[tuple[int, str], Any]  # of components, by (layer, name): immutable values


@dataclass
class KvSequence:
    """What the model has read of one sequence.

    Attributes:
        length: tokens read.
        blocks: where their keys and values are, in order.
        states: of components, shared by forks.
        frequency_length: of the rotary frequencies that its keys were turned with (`model.rotary`).
        revocable: of each component, its states after the last tokens, newest last, where these were only guessed.
        marks: states after so many tokens, at `mark_places` of the last pass that had any, and at the last of those
            before, in case that pass is taken back; None: not remembered.
    """

    length: int = 0
    blocks: list[int] = field(default_factory=list)
    states: States = field(default_factory=dict)
    frequency_length: int = 0
    revocable: dict[tuple[int, str], list[Any]] = field(default_factory=dict)
    marks: dict[int, States] | None = None


def mark_places(past: int, end: int) -> list[int]:
    """Where components' states are remembered when tokens from `past` to `end` are read, in tokens from the beginning.

    Every 256 tokens, or 512, 1024, … where that were more than 16 places in a text; and where another text may leave
    this one: at the end of its last whole block, and of the last before its last token, which the same text reads anew.
    """
    apart = _MARK_TOKENS
    while end // apart > _MOST_MARKS:
        apart *= 2
    last = {end // BLOCK_TOKENS * BLOCK_TOKENS, (end - 1) // BLOCK_TOKENS * BLOCK_TOKENS}
    return sorted(place for place in last | set(range(0, end + 1, apart)) if place > past)


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
            self.drop(last)
            sequence.blocks[-1] = own
        sequence.blocks.extend(self._take() for _ in range(needed))

    def fork(self, sequence: KvSequence) -> KvSequence:
        """Another sequence that starts with the same tokens. Nothing is copied until one of them writes."""
        self.hold(sequence.blocks)
        return replace(sequence, blocks=list(sequence.blocks), states=dict(sequence.states), revocable={}, marks=None)

    def hold(self, blocks: Iterable[int]) -> None:
        """Refer to blocks that are in use once more, until they are dropped."""
        for block in blocks:
            self._references[block] += 1

    def references(self, block: int) -> int:
        """How many sequences, and keepers, refer to a block."""
        return self._references[block]

    def take_back(self, sequence: KvSequence, count: int) -> None:
        """Forget the last `count` tokens, guessed in the last pass, and give back the blocks that they needed."""
        sequence.length -= count
        needed = -(-sequence.length // BLOCK_TOKENS)
        for block in sequence.blocks[needed:]:
            self.drop(block)
        del sequence.blocks[needed:]
        sequence.states |= {component: states[-1 - count] for component, states in sequence.revocable.items()}
        sequence.revocable = {}
        if sequence.marks is not None:
            sequence.marks = {place: at for place, at in sequence.marks.items() if place <= sequence.length}

    def release(self, sequence: KvSequence) -> None:
        """Give back what only this sequence used. It is empty then."""
        for block in sequence.blocks:
            self.drop(block)
        sequence.length, sequence.blocks, sequence.frequency_length = 0, [], 0
        sequence.states, sequence.revocable, sequence.marks = {}, {}, None

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = self._touched
            self._touched += 1
            self._block(block).zero_()  # attention gives unwritten places no weight, and 0 · NaN would be NaN
        self._references[block] = 1
        return block

    def drop(self, block: int) -> None:
        """Give up one reference; with the last, the block is free."""
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free.append(block)

    def _block(self, block: int) -> Tensor:
        return self.keys_and_values[:, block]
