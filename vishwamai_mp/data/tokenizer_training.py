"""How SentencePiece's byte pairs or unigram pieces are trained, such that any text encodes without loss."""

import io
import os
import re
import string
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.data.tokenizer import SPECIAL_TOKENS, Tokenizer

# A newline that never merges keeps lines apart and lets the encoder cut a document at each one (piece_cache.py).
_USER_SYMBOLS = (*SPECIAL_TOKENS, "\n")
# SentencePiece leaves sentences over 4192 bytes out of training; documents are cut well below that.
_TRAINING_PIECE_CHARS = 1000


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output_prefix: str | os.PathLike[str],
    *,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    maxtraining_pieces: int = 1_000_000,
    num_threads: int = 2,
    seed: int = 1234,
) -> Tokenizer:
    """Train a SentencePiece vocabulary on documents and write it to `<output_prefix>.model`.

    Every text encodes without loss: nothing is normalised, whitespace is kept, characters outside the vocabulary fall
    back to bytes, digits stand alone. (U+2581, SentencePiece's own mark for a space, alone decodes as a space.)
    Training sees documents in pieces of about 1000 characters and samples `maxtraining_pieces` of them where there
    are more, so memory stays under a few GB for any corpus. The file appears only when complete.

    Args:
        texts: the documents; read once.
        vocab_size: tokens in all, special ones and the 256 bytes included.
        model_type: `bpe` or `unigram`. Only the former can be written as a `tokenizer.json` on export.
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
            sentence_iterator=training_pieces(texts),
            model_writer=model,
            model_type=model_type,
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
            input_sentence_size=maxtraining_pieces,
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


def training_pieces(texts: Iterable[str]) -> Iterable[str]:
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
