"""A smaller model that guesses the next tokens of texts, one by one, for a larger one to judge in one pass.

It chooses as the larger model does, by the text's own options and with the noise of the same positions. At temperature
0 a guess stands where both models' likeliest tokens are one. With noise, where both have the same token first after it
is added (a Gumbel coupling): of two distributions p and q that happens with probability
Σ_x 1 / Σ_y max(p_y/p_x, q_y/q_x). Rejection sampling (arXiv 2211.17192) would accept Σ_x min(p_x, q_x), somewhat more,
but write another text, equal in distribution alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.inference.blocks import BLOCK_TOKENS, KvSequence
from vishwamai_mp.inference.choosing import Row, choose
from vishwamai_mp.inference.engine import Engine
from vishwamai_mp.inference.speculation import Asked


@dataclass
class _Reading:
    """What the draft model has read of a text.

    Attributes:
        sequence: the text as it was when guesses were last asked for, and all but the last of these.
        certain: tokens of that text that were read.
        guesses: that followed.
        after: of each component, its states after that text and after each guess that was read.
    """

    sequence: KvSequence = field(default_factory=KvSequence)
    certain: int = 0
    guesses: list[int] = field(default_factory=list)
    after: dict[tuple[int, str], list[Any]] = field(default_factory=dict)


class DraftModel:
    """The proposer of guesses that asks another model.

    Where its context or its pool of keys and values has no room for a text, it has no guesses.

    Args:
        engine: of the smaller model, on the processes of the larger one.
        judge: configuration of the larger model.

    Raises:
        UserError: the models do not have the same vocabulary.
    """

    def __init__(self, engine: Engine, judge: PretrainConfig) -> None:
        ours, theirs = engine.config.model.vocab_size, judge.model.vocab_size
        if ours != theirs:
            raise UserError(
                f"the draft model has a vocabulary of {ours} tokens, the model {theirs}; they must be the same"
            )
        self.engine = engine

    def begin(self) -> _Reading:
        return _Reading()

    def end(self, state: _Reading) -> None:
        self.engine.release(state.sequence)

    def guess(self, asked: Sequence[Asked]) -> list[list[int]]:
        """See `Proposer`: a pass over what is new of all texts, then one for each further guess."""
        guesses: list[list[int]] = [[] for _ in asked]
        for one in asked:
            self._go_back(one)
        counts = self._counts(asked)
        active = [i for i, count in enumerate(counts) if count]
        unread = {i: asked[i].text[asked[i].state.sequence.length :] for i in active}
        while active:
            for i, token in zip(active, self._next(asked, active, unread, guesses), strict=True):
                guesses[i].append(token)
                unread[i] = [token]
            active = [i for i in active if self._goes_on(asked[i], guesses[i], counts[i])]
        for one, found in zip(asked, guesses, strict=True):
            one.state.guesses = found
        return guesses

    def _go_back(self, one: Asked) -> None:
        """Take back guesses that were read and turned out wrong; begin anew where the frequencies have changed."""
        reading: _Reading = one.state
        read = reading.sequence.length - reading.certain
        right = 0
        for guess, token in zip(reading.guesses[:read], one.text[reading.certain :], strict=False):
            if guess != token:
                break
            right += 1
        if right < read:
            reading.sequence.revocable = reading.after
            self.engine.take_back(reading.sequence, read - right)
        # No guesses may follow now, for want of room: what is read is not taken back at the next call.
        reading.certain, reading.guesses = reading.sequence.length, []
        if self.engine.outgrows(reading.sequence, len(one.text) - reading.sequence.length):
            self.engine.release(reading.sequence)

    def _counts(self, asked: Sequence[Asked]) -> list[int]:
        """How many tokens to guess of each, as the context and the pool allow."""
        counts, free = [], self.engine.pool.free_blocks
        for one in asked:
            count = min(one.count, self.engine.context - len(one.text))
            needed = -(-(len(one.text) + count - 1) // BLOCK_TOKENS) - len(one.state.sequence.blocks)
            if count < 1 or needed > free:
                count, needed = 0, 0
            counts.append(count)
            free -= max(needed, 0)
        return counts

    def _next(
        self, asked: Sequence[Asked], active: list[int], unread: dict[int, list[int]], guesses: list[list[int]]
    ) -> list[int]:
        """The next token of each active text."""
        output = self.engine.run([(asked[i].state.sequence, unread[i]) for i in active])
        rows = []
        for i in active:
            one, reading = asked[i], asked[i].state
            if not guesses[i]:
                reading.certain, reading.after = len(one.text), {}
            for component, state in reading.sequence.states.items():
                reading.after.setdefault(component, []).append(state)
            options = replace(one.options, log_probs=False, top_log_probs=0)
            seen = one.text + guesses[i] if options.repetition_penalty != 1 else []
            rows.append(Row(options, len(one.text) + len(guesses[i]), seen))
        chosen = self.engine.decide(output, lambda shard, _: choose(shard, rows), 2).tolist()
        if not all(abs(number) < float("inf") for _, number in chosen):
            raise UserError(
                "the draft model's logits are not finite; its checkpoint is damaged or its training diverged"
            )
        return [int(token) for token, _ in chosen]

    def _goes_on(self, one: Asked, guesses: list[int], count: int) -> bool:
        ended = guesses[-1] in one.options.stop_tokens  # nothing is chosen behind it
        return len(guesses) < count and not ended and not self.engine.outgrows(one.state.sequence, 1)
