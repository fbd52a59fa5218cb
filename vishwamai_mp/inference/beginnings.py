"""Keys and values of texts that have ended, kept for later texts that begin alike.

They lie in the pool's whole blocks of 16 tokens, where they were written: a text that begins alike refers to these
blocks and reads what follows. A component's state is part of a beginning, and is known only where it was kept: after
`mark_places`. Every rank of a replica keeps and forgets the same, for what counts here is tokens, not its own bytes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from vishwamai_mp.config import ModelConfig
from vishwamai_mp.inference.blocks import BLOCK_TOKENS, BlockPool, KvSequence, States, mark_places
from vishwamai_mp.model.rotary import frequency_length

_WORTH_WAITING = 64  # tokens: a text waits for one pass where it can then begin with so many more


@dataclass
class _Kept:
    """A block of a beginning: with those before it, what a text may begin with.

    Attributes:
        number: names it as the one before its successors; never given again.
        block: of the pool.
        states: of components after its last token; None: not known, so that no text can begin with just this.
    """

    number: int
    block: int
    states: States | None = None


class Beginnings:
    """Beginnings of texts that one model has read; what was used least recently is forgotten first.

    Args:
        pool: where they lie. What is kept here counts as in use there.
        settings: of the model.
        tokens: to keep at most.
        has_states: whether the model has components, whose states go with a beginning.
    """

    def __init__(self, pool: BlockPool, settings: ModelConfig, tokens: int, has_states: bool) -> None:
        self._pool, self._settings, self._has_states = pool, settings, has_states
        self._most = tokens // BLOCK_TOKENS
        # By the number of the block before and its own 16 tokens, least recently used first. A block is never used
        # without all blocks before it, which count as used later than it: the first is always the end of a beginning.
        self._kept: OrderedDict[tuple[int, tuple[int, ...]], _Kept] = OrderedDict()
        self._numbers = count(1)

    @property
    def tokens(self) -> int:
        """That are kept."""
        return len(self._kept) * BLOCK_TOKENS

    def fit(self, prompt: int, longest: int) -> bool:
        """Whether a text may begin with what is kept, and what it reads be kept.

        Not where its rotary frequencies change between its prompt's length and its longest: all is read anew then, into
        blocks that would have to be free.
        """
        alike = frequency_length(self._settings, prompt) == frequency_length(self._settings, longest)
        return self._most > 0 and alike

    def begin(self, prompt: Sequence[int]) -> KvSequence:
        """What has read as much of the prompt as is kept, but not its last token."""
        path: list[tuple[tuple[int, tuple[int, ...]], _Kept]] = []
        number = self._first(len(prompt))
        for start in range(0, len(prompt) - BLOCK_TOKENS, BLOCK_TOKENS):
            key = number, tuple(prompt[start : start + BLOCK_TOKENS])
            kept = self._kept.get(key)
            if kept is None:
                break
            path.append((key, kept))
            number = kept.number
        while path and self._has_states and path[-1][1].states is None:
            path.pop()
        self._use([key for key, _ in path])
        sequence = KvSequence(marks={} if self._has_states else None)
        if path:
            sequence.length, sequence.blocks = len(path) * BLOCK_TOKENS, [kept.block for _, kept in path]
            sequence.states = dict(path[-1][1].states or {})
            sequence.frequency_length = frequency_length(self._settings, len(prompt))
            self._pool.hold(sequence.blocks)
        return sequence

    def keep(self, sequence: KvSequence, text: Sequence[int]) -> None:
        """Keep what a sequence has read of a text, as far as whole blocks and, with components, known states go."""
        marks = sequence.marks or {}
        blocks = max(marks, default=0) // BLOCK_TOKENS if self._has_states else sequence.length // BLOCK_TOKENS
        keys = []
        number = self._first(sequence.length)
        for i in range(blocks):
            key = number, tuple(text[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS])
            kept = self._kept.get(key)
            if kept is None:
                kept = self._kept[key] = _Kept(next(self._numbers), sequence.blocks[i])
                self._pool.hold([kept.block])
            if kept.states is None:
                kept.states = marks.get((i + 1) * BLOCK_TOKENS)
            keys.append(key)
            number = kept.number
        self._use(keys)
        while len(self._kept) > self._most:
            self._forget_oldest()

    def make_room(self, blocks: int) -> bool:
        """Forget until the pool has so many free blocks; nothing, where that would not be enough."""
        missing = blocks - self._pool.free_blocks
        if missing > 0 and missing > sum(self._pool.references(kept.block) == 1 for kept in self._kept.values()):
            return False
        while self._pool.free_blocks < blocks:
            self._forget_oldest()
        return True

    def is_worth_waiting(self, prompt: Sequence[int], begun: int, other: Sequence[int]) -> bool:
        """Whether a text that can begin with `begun` tokens could begin with many more once `other` has been read."""
        least = begun + _WORTH_WAITING
        if self._has_states:
            places = [place for place in mark_places(0, len(other)) if place >= least]
        else:
            places = [-(-least // BLOCK_TOKENS) * BLOCK_TOKENS]
        return any(place < len(prompt) and prompt[:place] == other[:place] for place in places[:1])

    def forget(self) -> None:
        """Keep nothing of what was read so far."""
        while self._kept:
            self._forget_oldest()

    def _first(self, length: int) -> int:
        """In place of the number of a block before the first: keys are of one length of rotary frequencies."""
        return -frequency_length(self._settings, length)

    def _use(self, keys: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        for key in reversed(keys):
            self._kept.move_to_end(key)

    def _forget_oldest(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self._pool.drop(kept.block)
