"""Guesses at a text's next tokens, which the model then judges several at a time (speculative decoding).

The noise of sampling is named by a token's position, so what the model would choose in each place is known in one pass
over the guesses. A guess stands where it is just that: the text is the one that is written without guesses, whoever
proposes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vishwamai_mp.inference.options import SamplingOptions

_LONGEST, _SHORTEST = 4, 2  # tokens that have to have occurred before


@dataclass(frozen=True)
class Asked:
    """A text whose next tokens are to be guessed.

    Attributes:
        state: what `Proposer.begin` made for it.
        text: its tokens so far, the prompt among them.
        count: of guesses, at most; at least 1.
        options: how its tokens are chosen.
    """

    state: Any
    text: list[int]
    count: int
    options: SamplingOptions


class Proposer(Protocol):
    """Guesses, which are judged all in one way. On every rank the same."""

    def begin(self) -> Any:
        """What is to be kept of a new text."""
        ...

    def guess(self, asked: Sequence[Asked]) -> list[list[int]]:
        """For each at most `count` tokens that may follow. A text is the last call's, or one that begins with it."""
        ...

    def end(self, state: Any) -> None:
        """Forget a text; it may have been forgotten already."""
        ...


class Repetitions:
    """Proposes what texts repeat."""

    def begin(self) -> "RepeatedText":
        return RepeatedText()

    def guess(self, asked: Sequence[Asked]) -> list[list[int]]:
        return [one.state.guess(one.text, one.count) for one in asked]

    def end(self, state: "RepeatedText") -> None:
        """Nothing is held."""


class RepeatedText:
    """Guesses that a text goes on as it did where its last tokens occurred before (prompt lookup decoding).

    The longest run of last tokens that occurred counts, and of its places the newest.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # tokens → where the one behind them was, last time
        self._known = 0  # places that `_after` knows

    def guess(self, text: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow. The text is the last call's, or one that begins with it."""
        for place in range(max(1, self._known), len(text)):
            for length in range(_SHORTEST, min(_LONGEST, place) + 1):
                self._after[tuple(text[place - length : place])] = place
        self._known = len(text)
        for length in range(min(_LONGEST, len(text)), _SHORTEST - 1, -1):
            newest = self._after.get(tuple(text[len(text) - length :]))
            if newest is not None:
                period = len(text) - newest  # a repetition goes on in the guesses themselves
                return [text[newest + i % period] for i in range(count)]
        return []


class Pace:
    """How many tokens to guess next: twice as many after all were right, one more than were right otherwise.

    Args:
        most: at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = self.count = most

    def judged(self, guessed: int, right: int) -> None:
        """Learn what became of the last guesses."""
        if guessed:
            self.count = min(self._most, 2 * self.count if right == guessed else right + 1)
