"""The tokenizer: a SentencePiece model with the names the rest of the project uses, and how one is trained."""

import io
import os
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.data.file_kinds import foreign_tokenizer, refuse_pointer

SPECIAL_TOKENS = ("[MEMORY]", "[REASONING]", "[CACHE]", "[STEP]")
SETTINGS_FILE, CHAT_TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
_COMPANIONS = (
    SETTINGS_FILE,
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# A newline that never merges keeps lines apart and lets the encoder cut a document at each one (piece_cache.py).
_USER_SYMBOLS = (*SPECIAL_TOKENS, "\n")
# SentencePiece leaves sentences over 4192 bytes out of training; documents are cut well below that.
_TRAINING_PIECE_CHARS = 1000


class Tokenizer:
    """Text to token ids and back, from a SentencePiece `.model` file.

    `vocab_size` counts real tokens only: padding for tensor parallelism is the model's business. The four special
    tokens are recognised wherever they stand in a text; `special_ids` maps those this vocabulary has to their ids.
    Ids a vocabulary lacks (`bos_id`, `pad_id`, `eod_id`) are -1, as in SentencePiece.

    Raises `UserError` where the file is missing or is no SentencePiece model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.proto = _read_model_file(self.path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
            self.vocab_size: int = self._processor.get_piece_size()
        except (RuntimeError, ValueError, OSError) as error:
            if kind := foreign_tokenizer(self.proto):
                raise UserError(f"tokenizer {self.path} is {kind}: only SentencePiece models can be used") from error
            raise UserError(f"tokenizer {self.path} is not a whole SentencePiece model: make it again") from error
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eod_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()
        found = {token: self._processor.piece_to_id(token) for token in SPECIAL_TOKENS}
        self.special_ids: dict[str, int] = {token: i for token, i in found.items() if i != self.unk_id}

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added at either end.

        Raises `UserError` where the text holds a lone surrogate, which no UTF-8 can carry.
        """
        check_encodable(text)
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]  # SentencePiece's own batch call starts threads, and is slower

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens (bos, eod, pad) have none, incomplete bytes become U+FFFD.

        Raises `UserError` on an id outside `[0, vocab_size)`.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is outside the vocabulary of {self.path}: 0 to {self.vocab_size - 1}")
        return self._processor.decode(ids)

    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id, such as `▁the` or `<0x0A>`."""
        return self._processor.id_to_piece(token_id)

    def token_to_id(self, token: str) -> int:
        """The id of a token by its own spelling; `UserError` where the vocabulary lacks it."""
        token_id = self._processor.piece_to_id(token)
        if token_id == self.unk_id and self._processor.id_to_piece(self.unk_id) != token:
            raise UserError(f"tokenizer {self.path} has no token {token!r}")
        return token_id

    def find(self, token: str) -> int | None:
        """The id of a token by its own spelling; None where the vocabulary lacks it."""
        token_id = self._processor.piece_to_id(token)
        return None if token_id == self.unk_id else token_id

    def tokens(self) -> list[str]:
        """Every token's spelling, by id."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def control_tokens(self) -> dict[str, int]:
        """Tokens without a text of their own, such as bos and eos, by their spelling."""
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size) if self._processor.is_control(i)}

    def has_byte_fallback(self) -> bool:
        """Whether a character outside the vocabulary becomes its UTF-8 bytes rather than `<unk>`."""
        return sum(self._processor.is_byte(i) for i in range(self.vocab_size)) == 256

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


def companions(path: str | os.PathLike[str]) -> list[Path]:
    """Files beside a SentencePiece model that say how its language model is addressed, as Hugging Face has them."""
    places = (Path(path).with_name(name) for name in _COMPANIONS)
    return [place for place in places if place.is_file()]


def check_encodable(text: str) -> None:
    """Raise `UserError` where `text` cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise UserError(f"text cannot be UTF-8: lone surrogate {found}") from None


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output_prefix: str | os.PathLike[str],
    *,
    character_coverage: float = 0.9995,
    max_training_pieces: int = 1_000_000,
    num_threads: int = 2,
    seed: int = 1234,
) -> Tokenizer:
    """Train a BPE vocabulary on documents and write it to `<output_prefix>.model`.

    Every text encodes without loss: nothing is normalised, whitespace is kept, characters outside the vocabulary fall
    back to bytes, digits stand alone. (U+2581, SentencePiece's own mark for a space, alone decodes as a space.)
    Training sees documents in pieces of about 1000 characters and samples `max_training_pieces` of them where there
    are more, so memory stays under a few GB for any corpus. The file appears only when complete.

    Args:
        texts: the documents; read once.
        vocab_size: tokens in all, special ones and the 256 bytes included.
        character_coverage: share of the characters read that get a token of their own; printable ASCII always does.
        seed: of that sample.

    Raises `UserError` where the corpus is empty, too small for `vocab_size`, or the file cannot be written.
    """
    if vocab_size < 1:
        raise UserError(f"--vocab-size {vocab_size} is too small: special tokens and bytes alone take over 260")
    target = Path(f"{os.fspath(output_prefix)}.model")
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: there is no folder {target.parent}")
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_pieces(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=list(_USER_SYMBOLS),
            required_chars="".join(c for c in string.printable if c.isprintable() and c != " "),
            character_coverage=character_coverage,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            input_sentence_size=max_training_pieces,
            shuffle_input_sentence=True,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_failure(str(error), vocab_size)) from error
    try:
        write_whole(target, model.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    return Tokenizer(target)


def _read_model_file(path: Path) -> bytes:
    try:
        refuse_pointer(path)
        proto = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no tokenizer file {path}: make one with tools/train_tokenizer.py") from None
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror}") from error
    if not proto:
        raise UserError(f"tokenizer {path} is empty: train or copy it again")
    return proto


def _training_pieces(texts: Iterable[str]) -> Iterable[str]:
    """Documents in short pieces, cut at a line's end where one is near."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + _TRAINING_PIECE_CHARS
            newline = text.rfind("\n", start, end)
            if end < len(text) and newline >= start:
                end = newline + 1
            piece = text[start:end]
            start = end
            if piece.strip() and "\0" not in piece:
                yield piece


def _training_failure(message: str, vocab_size: int) -> str:
    if "sentences_.empty()" in message:
        return "the input has no text to train a tokenizer on"
    if "smaller than required_chars" in message:
        needed = re.search(r"\. \d+ vs (\d+)\.", message)
        more = f"need at least {needed[1]}" if needed else "need more"
        return f"--vocab-size {vocab_size} is too small: special tokens, bytes and this text's characters {more}"
    if "too high" in message:
        limit = message.rsplit("<= ", 1)[-1].rstrip(". ")
        return f"--vocab-size {vocab_size} is more than this text can fill: at most {limit}, or give more text"
    return f"tokenizer training failed: {' '.join(message.split())}"
