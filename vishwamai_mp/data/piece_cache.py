"""Fast exact encoding: a document is cut where no token can reach across, and each distinct cut is encoded once.

In a byte-pair encoding a merge happens only where its result is a token. So if no token of the vocabulary has a
separator (a space, a newline) after another character, nothing ever merges across the point before a separator, and
the encoding of a text is the concatenation of the encodings of its parts. Words repeat (Zipf), so nearly all parts
come from a table, already as the bytes that go to disk.

Byte-level tokenizers cut texts by a rule first, and merge within cuts; most of these rules cut before each space that
follows something else than whitespace.

Whether a model allows this is read from the model itself; where it does not, every document goes whole through its
library. The tokens are the same either way.
"""

import re
from collections.abc import Iterator

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from vishwamai_mp.data.tokenizer import Tokenizer

_SPACE = "\u2581"  # what SentencePiece writes for a space inside tokens
_WHITE = r"[\s\u180e]"  # whitespace to Python, or to any version of Unicode
_MAX_ENTRIES = 1 << 17  # about 30 MB; a full table is emptied, so it follows a corpus whose language changes
_MAX_ENTRY_CHARS = 64
_SLICE_CHARS = 1 << 18  # of a long document cut at a time, which bounds the list of its parts


class DocumentEncoder:
    """Documents to the little-endian bytes of their token ids, with a bounded table of parts seen before."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._table = _PieceTable(tokenizer, dtype)
        separators = separators_of(tokenizer)
        self._parts: re.Pattern[str] | None = None
        if separators:
            inside = re.escape(separators)
            self._parts = re.compile(f"[{inside}]*[^{inside}]+|[{inside}]+")
            self._cut = re.compile(f"(?<=[^{inside}])[{inside}]")
        elif tokenizer.vocabulary.cuts_at_spaces:
            self._parts = re.compile(rf" *[^ ]+(?:(?<={_WHITE}) +[^ ]*)*| +")
            self._cut = re.compile(rf"(?<!{_WHITE}) ")

    def encode(self, text: str) -> bytes:
        """The token ids of `text` in the file's dtype, as `Tokenizer.encode` gives them."""
        if self._parts is None:
            return self._table.encode(text)
        lookup, parts = self._table.__getitem__, self._parts
        if len(text) <= _SLICE_CHARS:
            return b"".join(map(lookup, parts.findall(text)))
        return b"".join(b"".join(map(lookup, parts.findall(piece))) for piece in self._slices(text))

    def _slices(self, text: str) -> Iterator[str]:
        start = 0
        while start < len(text):
            cut = self._cut.search(text, start + _SLICE_CHARS)
            end = cut.start() if cut else len(text)
            yield text[start:end]
            start = end


class _PieceTable(dict[str, bytes]):
    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._dtype = dtype

    def encode(self, text: str) -> bytes:
        return np.array(self._tokenizer.encode(text), dtype=self._dtype).tobytes()

    def __missing__(self, part: str) -> bytes:
        encoded = self.encode(part)
        if len(part) <= _MAX_ENTRY_CHARS:
            if len(self) >= _MAX_ENTRIES:
                self.clear()
            self[part] = encoded
        return encoded


def separators_of(tokenizer: Tokenizer) -> str:
    """The characters a document may be cut before, or "" where the model allows no cutting.

    Cutting is exact for a BPE model that leaves text as it is (no normalisation, no added or removed spaces) and falls
    back to bytes (without it, neighbouring unknown characters fuse into one `<unk>`).
    """
    if tokenizer.proto is None or not (_keeps_text(tokenizer.proto) and tokenizer.has_byte_fallback()):
        return ""
    tokens = tokenizer.tokens()
    # A user-defined token keeps a plain space; every other token has SentencePiece's mark for it.
    for separators in (f" {_SPACE}\n", f" {_SPACE}"):
        led_by_separators = re.compile(f"[{separators}]*[^{separators}]*")
        if all(led_by_separators.fullmatch(token) for token in tokens):
            return separators
    return ""


def _keeps_text(proto: bytes) -> bool:
    """Whether a SentencePiece `ModelProto` is a BPE model that leaves text as it is, with spaces before words."""
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)  # type: ignore[attr-defined]
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    changes_text = normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    is_bpe = trainer.model_type == trainer.BPE
    return is_bpe and not trainer.treat_whitespace_as_suffix and not changes_text and normalizer.escape_whitespaces
