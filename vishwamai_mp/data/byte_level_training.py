"""How a byte-level tokenizer is trained, as GPT-2 and most models since have: byte pairs over the 256 bytes."""

import os
from collections.abc import Iterable
from pathlib import Path

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.config.files import write_whole
from vishwamai_mp.config.wording import lacks
from vishwamai_mp.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from vishwamai_mp.data.tokenizer_training import training_pieces

_CONTROL_TOKENS = ("<s>", "</s>", "<pad>")  # found by these spellings where no tokenizer_config.json names them
_SMALLEST = 256 + len(_CONTROL_TOKENS) + len(SPECIAL_TOKENS)


def train_byte_level(texts: Iterable[str], vocab_size: int, output_prefix: str | os.PathLike[str]) -> Tokenizer:
    """Train a byte-level BPE vocabulary on documents and write it to `<output_prefix>.json`, a `tokenizer.json`.

    Texts encode without loss, except that a text which spells a control token (`<s>`, `</s>`, `<pad>`) is that token,
    as in every tokenizer of this format. Digits stand alone. The file appears only when complete.

    Args:
        texts: the documents; read once. The counts of their distinct words are held in memory.
        vocab_size: tokens in all, at least 263: the bytes, three control tokens and our four special ones.

    Raises `UserError` where the package `tokenizers` is missing, the corpus is empty or too small for `vocab_size`, or
    the file cannot be written.
    """
    try:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Fast
    except ImportError:
        raise UserError(lacks("--type byte-bpe", "tokenizers")) from None
    if vocab_size < _SMALLEST:
        raise UserError(f"--vocab-size {vocab_size} is too small: bytes and special tokens alone are {_SMALLEST}")
    target = Path(f"{os.fspath(output_prefix)}.json")
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: there is no folder {target.parent}")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        special_tokens=list(_CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(training_pieces(texts), trainer)
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in SPECIAL_TOKENS])
    if (reached := fast.get_vocab_size()) < vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size} is more than this text can fill: at most {reached}, or give more text"
        )
    try:
        write_whole(target, fast.to_str(pretty=True).encode())
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    return Tokenizer(target)
