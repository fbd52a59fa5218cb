"""The text that new tokens add to a prompt: decode(prompt + new) beyond decode(prompt).

New tokens alone decode to something else: SentencePiece takes the space away that a text begins with, and a character
may take several tokens, of which the first decode to U+FFFD.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the bytes of a character decode to before its last is there


class AddedText:
    """The text of tokens that come one by one or in pieces. Only what no later token can change is in it.

    A token costs the decoding of the few tokens before it, not of the whole prompt.

    Args:
        decode: text of token ids.
        prompt: the tokens before.

    Attributes:
        text: so far.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self.text = ""
        self._decode = decode
        self._window = list(prompt)  # the newest tokens: as many as it takes to decode what follows rightly
        self._settled = len(self._window)  # of these, how many `_before` is the text of
        self._before = decode(self._window)

    def fork(self) -> "AddedText":
        """What goes on from here; its `text` is that of further tokens alone."""
        other = object.__new__(AddedText)
        other.__dict__.update(self.__dict__, text="", _window=list(self._window))
        return other

    def add(self, tokens: Sequence[int]) -> str:
        """Read further tokens. Returns what `text` has grown by."""
        self._window += tokens
        whole = self._decode(self._window)
        return "" if whole.endswith(_UNFINISHED) else self._take(whole)

    def end(self) -> str:
        """Nothing follows: the bytes of a character that was not finished stand as U+FFFD. Returns as `add` does."""
        return self._take(self._decode(self._window))

    def _take(self, whole: str) -> str:
        start = len(self._before)
        while not whole.startswith(self._before[:start]):
            start -= 1  # back to before a character that was not finished and now is
        new = whole[start:]
        self.text += new
        later = self._window[self._settled :]
        # Decoding begins anew only where something visible is read first: spaces that a text begins with may be lost.
        if (text := self._decode(later)).strip():
            self._window, whole = later, text
        self._settled, self._before = len(self._window), whole
        return new


def added_text(decode: Decode, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What all of `tokens` add to the prompt's text."""
    added = AddedText(decode, prompt)
    added.add(tokens)
    added.end()
    return added.text


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> str | None:
    """The stop string that is found first in the text, looking for such as end after `start`; None: there is none."""
    places = {stop: text.find(stop, max(0, start - len(stop) + 1)) for stop in stops}
    found = [stop for stop, place in places.items() if place >= 0]
    return min(found, key=places.__getitem__) if found else None


def without_begun_stop(text: str, stops: Sequence[str]) -> str:
    """The text without an end that may become a stop string."""
    begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(begun, default=0)]
