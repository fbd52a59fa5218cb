"""The tokenizer: one interface to the kinds of files that hold one."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe
from vishwamai_mp.data.json_vocabulary import ADDED_TOKENS_FILE, SETTINGS_FILE, JsonVocabulary
from vishwamai_mp.data.sentencepiece_vocabulary import SentencePieceVocabulary

SPECIAL_TOKENS = ("[MEMORY]", "[REASONING]", "[CACHE]", "[STEP]")
MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
_COMPANIONS = (
    SETTINGS_FILE,
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
    JSON_FILE,
    "special_tokens_map.json",
    ADDED_TOKENS_FILE,
)


class Vocabulary(Protocol):
    """Text to token ids and back, by one kind of file. Ids that it lacks are -1.

    Attributes:
        size: ids, from 0.
        proto: a SentencePiece model's own bytes; None: it is none.
        puts_bos_first: whether it would put BOS before a text by itself; None: it does not say.
        cuts_at_spaces: whether a `tokenizer.json` encodes what is before a space and from it on apart, wherever the
            space follows something else than whitespace.
    """

    size: int
    proto: bytes | None
    unk_id: int
    bos_id: int
    eod_id: int
    pad_id: int
    puts_bos_first: bool | None
    cuts_at_spaces: bool

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def encode_placed(self, text: str) -> list[tuple[int, int, int]]: ...

    def decode(self, ids: list[int]) -> str: ...

    def spelling(self, token_id: int) -> str: ...

    def find(self, token: str) -> int | None: ...

    def content_of(self, token_id: int) -> bytes: ...

    def control_tokens(self) -> dict[str, int]: ...

    def has_byte_fallback(self) -> bool: ...


class Tokenizer:
    """Text to token ids and back, from a SentencePiece model, a `tokenizer.json`, or a folder that has one of them.

    `vocab_size` counts real tokens only: padding for tensor parallelism is the model's business. The four special
    tokens are recognised wherever they stand in a text; `special_ids` maps those this vocabulary has to their ids.
    Ids a vocabulary lacks (`bos_id`, `pad_id`, `eod_id`) are -1, as in SentencePiece.

    Raises `UserError` where the file is missing or is neither.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = tokenizer_file(path)
        self.vocabulary = _open(self.path)
        self.vocab_size = self.vocabulary.size
        self.unk_id, self.bos_id = self.vocabulary.unk_id, self.vocabulary.bos_id
        self.eod_id, self.pad_id = self.vocabulary.eod_id, self.vocabulary.pad_id
        found = {token: self.find(token) for token in SPECIAL_TOKENS}
        self.special_ids: dict[str, int] = {token: i for token, i in found.items() if i is not None}

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def proto(self) -> bytes | None:
        """A SentencePiece model's own bytes; None of a `tokenizer.json`."""
        return self.vocabulary.proto

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added at either end.

        Raises `UserError` where the text holds a lone surrogate, which no UTF-8 can carry.
        """
        check_encodable(text)
        return self.vocabulary.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        for text in texts:
            check_encodable(text)
        return self.vocabulary.encode_batch(list(texts))

    def encode_placed(self, text: str) -> list[tuple[int, int, int]]:
        """`encode` of a text, and beside each id from and to which character of the text it is.

        The places are the library's: a character that is several tokens is at all of them or at one alone.
        """
        check_encodable(text)
        return self.vocabulary.encode_placed(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens (bos, eod, pad) have none, incomplete bytes become U+FFFD.

        Raises `UserError` on an id outside `[0, vocab_size)`.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(
                    f"token id {i} is outside the vocabulary of {self.path.name}: 0 to {self.vocab_size - 1}"
                )
        return self.vocabulary.decode(ids)

    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id, such as `▁the`, `Ġthe` or `<0x0A>`; empty for a number left out."""
        return self.vocabulary.spelling(token_id)

    def content_of(self, token_id: int) -> bytes:
        """What one token alone stands for, in UTF-8; a part of a character may be all that it is. Control tokens have
        their spelling."""
        return self.vocabulary.content_of(token_id)

    def token_to_id(self, token: str) -> int:
        """The id of a token by its own spelling; `UserError` where the vocabulary lacks it."""
        token_id = self.find(token)
        if token_id is None:
            raise UserError(f"tokenizer {self.path} has no token {token!r}")
        return token_id

    def find(self, token: str) -> int | None:
        """The id of a token by its own spelling; None where the vocabulary lacks it."""
        return self.vocabulary.find(token)

    def tokens(self) -> list[str]:
        """Every token's spelling, by id."""
        return [self.id_to_token(i) for i in range(self.vocab_size)]

    def control_tokens(self) -> dict[str, int]:
        """Tokens without a text of their own, such as bos and eos, by their spelling."""
        return self.vocabulary.control_tokens()

    def has_byte_fallback(self) -> bool:
        """Whether a character outside the vocabulary becomes its UTF-8 bytes rather than `<unk>`."""
        return self.vocabulary.has_byte_fallback()

    def check_fits(self, vocab_size: int) -> None:
        """Raise `UserError` where a model of `vocab_size` tokens lacks some of these.

        It may have more: embeddings are often padded beyond the tokenizer, with rows that no text leads to.
        """
        if self.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer {self.path} has {self.vocab_size} tokens, the model {vocab_size};"
                " give the one that the model was trained with"
            )

    def require_eod(self) -> int:
        """The end-of-document id; `UserError` where this vocabulary has none."""
        if self.eod_id < 0:
            raise UserError(f"tokenizer {self.path} has no end-of-document token (SentencePiece's eos)")
        return self.eod_id

    def require_bos(self) -> int:
        """The beginning-of-sequence id; `UserError` where this vocabulary has none."""
        if self.bos_id < 0:
            raise UserError(f"tokenizer {self.path} has no beginning-of-sequence token (SentencePiece's bos)")
        return self.bos_id


def tokenizer_file(path: str | os.PathLike[str]) -> Path:
    """The tokenizer's file that `path` means: itself, or in a folder `tokenizer.model`, else `tokenizer.json`.

    Raises `UserError` for a folder with neither.
    """
    place = Path(path)
    if not place.is_dir():
        return place
    found = next((place / name for name in (MODEL_FILE, JSON_FILE) if (place / name).is_file()), None)
    if found is None:
        raise UserError(f"tokenizer {place}: the folder has neither {MODEL_FILE} nor {JSON_FILE}; name the file")
    return found


def has_tokenizer(folder: Path) -> bool:
    """Whether `tokenizer_file` finds one in a folder."""
    return any((folder / name).is_file() for name in (MODEL_FILE, JSON_FILE))


def token_difference(folder: Path, path: str | os.PathLike[str] | None) -> str | None:
    """Where a tokenizer means other texts by its ids than the one that a run folder keeps; None where there is no such
    id, or no two tokenizers."""
    if path is None or not has_tokenizer(folder):
        return None
    kept, given = tokenizer_file(folder), tokenizer_file(path)
    if _read_model_file(kept) == _read_model_file(given):
        return None
    before, now = Tokenizer(kept), Tokenizer(given)
    for token in range(min(before.vocab_size, now.vocab_size)):
        spelled = [one.content_of(token).decode(errors="backslashreplace") for one in (before, now)]
        if spelled[0] != spelled[1]:
            return f"token {token} is {spelled[0]!r} in {kept} and {spelled[1]!r} in {given}"
    return None


def kept_files(path: str | os.PathLike[str]) -> dict[str, Path]:
    """What a run keeps of its tokenizer, by the names that it is found by there: its file and `companions`."""
    file = tokenizer_file(path)
    name = JSON_FILE if _is_json(_read_model_file(file)) else MODEL_FILE
    return {**{beside.name: beside for beside in companions(file)}, name: file}


def companions(path: str | os.PathLike[str]) -> list[Path]:
    """Files beside a tokenizer that say how its language model is addressed, as Hugging Face has them."""
    places = (Path(path).with_name(name) for name in _COMPANIONS if name != Path(path).name)
    return [place for place in places if place.is_file()]


def check_encodable(text: str) -> None:
    """Raise `UserError` where `text` cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise UserError(f"text cannot be UTF-8: lone surrogate {found}") from None


def _read_model_file(path: Path) -> bytes:
    try:
        refuse_pointer_or_pipe(path)
        proto = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no tokenizer file {path}: make one with tools/train_tokenizer.py") from None
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror}") from error
    if not proto:
        raise UserError(f"tokenizer {path} is empty: train or copy it again")
    return proto


def _open(path: Path) -> Vocabulary:
    content = _read_model_file(path)
    return (JsonVocabulary if _is_json(content) else SentencePieceVocabulary)(path, content)


def _is_json(content: bytes) -> bool:
    return content[:1024].lstrip().startswith(b"{")
