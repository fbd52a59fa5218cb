"""Token ids of texts in which control tokens are spelled out, as chat templates write them."""

import re
from collections.abc import Iterator

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.data.json_vocabulary import SETTINGS_FILE, read_settings, settings_beside, tokens_beside
from vishwamai_mp.data.tokenizer import Tokenizer

_Placed = tuple[int, int, int]  # a token's id, and from and to which character of the text it is; often one is empty


class SpelledTokens:
    """A tokenizer with `tokenizer_config.json` beside it, which names tokens and may add some.

    Attributes:
        settings: the file's; empty without one.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.settings = read_settings(tokenizer.path.with_name(SETTINGS_FILE))
        self._lacking = lacking(tokenizer)
        self._marks = tokenizer.control_tokens() if tokenizer.proto is not None else {}
        pattern = "|".join(re.escape(mark) for mark in sorted(self._marks, key=len, reverse=True))
        self._pattern = re.compile(f"({pattern})") if pattern else None
        self._line_break = tokenizer.encode("\n")

    def named(self, name: str) -> int | None:
        """The id of a token that the settings name, such as `eos_token`."""
        said = self._said(name)
        return None if said is None else self._tokenizer.find(said)

    def variables(self) -> dict[str, str]:
        """What transformers tells every template: how the tokens that begin and end texts are spelled."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {name: self._spelling(name) or "" for name in names}

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing is added, and control tokens that are spelled out are themselves.

        Raises:
            UserError: the text spells a token that the tokenizer lacks.
        """
        self._check(text)
        if self._tokenizer.proto is None:  # a tokenizer.json finds them itself
            return self._tokenizer.encode(text)
        return [token for token, _, _ in self._placed(text)]

    def encode_spans(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Token ids as `encode` gives them, and for each whether it holds something of the `spans`.

        Args:
            spans: from and to which character, in order.
        """
        self._check(text)
        ids, held = [], []
        rest = iter(spans)
        start, end = next(rest, (len(text), len(text)))
        behind = 0  # where the text before this token ends
        placed = self._placed(text) if self._tokenizer.proto is not None else self._tokenizer.encode_placed(text)
        for token, first, last in placed:
            # A byte of a longer character, or white space that a tokenizer leaves out of its places.
            if first == last:
                first, last = (behind, last) if behind < last else (first, first + 1)
            behind = max(behind, last)
            while end <= first and end < len(text):
                start, end = next(rest, (len(text), len(text)))
            ids.append(token)
            held.append(first < end and start < last)
        return ids, held

    def _placed(self, text: str) -> Iterator[_Placed]:
        """Of a SentencePiece model, which finds no control tokens in a text by itself."""
        at = 0
        for number, part in enumerate(self._pattern.split(text) if self._pattern else [text]):
            if part in self._marks:
                yield self._marks[part], at, at + len(part)
            elif part:
                begins = number == 0 or bool(self.settings.get("legacy"))
                placed = self._tokenizer.encode_placed(part) if begins else self._going_on(part)
                for token, first, last in placed:
                    yield token, at + first, at + last
            at += len(part)

    def _going_on(self, text: str) -> list[_Placed]:
        """As the text is encoded behind other text: some vocabularies begin a text with a space of their own."""
        skip = len(self._line_break)
        placed = self._tokenizer.encode_placed("\n" + text)
        if [token for token, _, _ in placed[:skip]] != self._line_break:
            return self._tokenizer.encode_placed(text)
        return [(token, max(0, first - 1), last - 1) for token, first, last in placed[skip:]]

    def _check(self, text: str) -> None:
        for token in self._lacking:
            if token in text:
                raise UserError(f"the chat template writes {token}, which the tokenizer {self._tokenizer.path} lacks")

    def _said(self, name: str) -> str | None:
        said = self.settings.get(name)
        if isinstance(said, dict):
            said = said.get("content")
        return said if isinstance(said, str) else None

    def _spelling(self, name: str) -> str | None:
        tokenizer = self._tokenizer
        ids = {
            "bos_token": tokenizer.bos_id,
            "eos_token": tokenizer.eod_id,
            "pad_token": tokenizer.pad_id,
            "unk_token": tokenizer.unk_id,
        }
        return self._said(name) or (tokenizer.id_to_token(ids[name]) if ids[name] >= 0 else None)


def lacking(tokenizer: Tokenizer) -> list[str]:
    """Tokens but padding that files beside a tokenizer's add to it, and that it has not.

    A `tokenizer.json` is given them when it is read.
    """
    if tokenizer.proto is None:
        return []
    padding = settings_beside(tokenizer.path).get("pad_token")
    tokens = (token["content"] for token in tokens_beside(tokenizer.path))
    return [token for token in tokens if token != padding and tokenizer.find(token) is None]
