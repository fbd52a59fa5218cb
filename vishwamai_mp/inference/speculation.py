"""Guesses at a text's next tokens, which the model then judges several at a time (speculative decoding).

The noise of sampling is named by a token's position, so what the model would choose in each place is known in one pass
over the guesses. A guess stands where it is just that: the text is the one that is written without guesses.
"""

from collections.abc import Sequence

_LONGEST, _SHORTEST = 4, 2  # tokens that have to have occurred before


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
