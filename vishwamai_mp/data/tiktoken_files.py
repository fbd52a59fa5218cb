"""tiktoken's files, and Mistral's `tekken.json`, as a `tokenizer.json` of Hugging Face's `tokenizers`.

A tiktoken file has a token's bytes and its rank in each line, and no more: how texts are cut before bytes are joined,
and which special tokens there are, stands in the program that loads it. tiktoken joins the neighbours whose joint token
has the lowest rank, and takes a whole cut that is a token as it is; a `tokenizer.json` says the same by a list of pairs
in order of rank and `ignore_merges`.
"""

import base64
import binascii
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vishwamai_mp.config.errors import UserError, one_line
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe
from vishwamai_mp.config.wording import counted, lacks
from vishwamai_mp.data.cutting import PATTERNS
from vishwamai_mp.data.json_vocabulary import byte_alphabet

_MOST_DIGITS = 9  # of a rank: numbers of tokens have 32 bits


def tokenizer_json(path: Path, pattern: str | None, special: Sequence[str]) -> str:
    """The content of a `tokenizer.json`.

    Args:
        path: a tiktoken file, or a `tekken.json`, which has a pattern of its own.
        pattern: a name in `PATTERNS` or a regular expression; None: the file's own.
        special: tokens found wherever they are spelled in a text. They get the numbers after a tiktoken file's, or the
            first ones of a `tekken.json` that names none.

    Raises:
        UserError: the file is neither, has not all 256 bytes, says nothing of what is left out here, or makes no
            tokenizer with these arguments.
    """
    refuse_pointer_or_pipe(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if content.lstrip().startswith(b"{"):
        ranks, shift, own, pattern = _read_tekken(path, content, special, pattern)
    else:
        ranks, shift = _read_ranks(path, content), 0
        first = max(ranks.values()) + 1
        own = {token: first + number for number, token in enumerate(special)}
    if "" in special or len(set(special)) < len(special):
        raise UserError("--special-tokens: one is empty or stands twice; their numbers are those of their places")
    if pattern is None:
        raise UserError(f"{path} does not say how texts are cut: give --pattern, one of {', '.join(PATTERNS)}")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path} is not whole: it lacks {len(missing)} of the 256 bytes")
    if taken := [token for token in own if token.encode() in ranks]:
        raise UserError(f"--special-tokens {taken[0]}: a token of {path} already")
    if pattern not in PATTERNS and pattern.isidentifier():  # no rule is a mere word
        raise UserError(
            f"--pattern {pattern} is not known: write one of {', '.join(PATTERNS)}, or a regular expression"
        )
    described = _described(ranks, shift, own, PATTERNS.get(pattern, pattern))
    _try(path, described, pattern)
    return described


def _try(path: Path, described: str, pattern: str) -> None:
    """Refuse what the library does not take, before anything is written of it."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(lacks(f"converting {path}", "tokenizers")) from None
    try:
        Tokenizer.from_str(described)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} makes no tokenizer with the rule {pattern!r}: {one_line(error)}") from None


def _read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            encoded, rank = line.split()
            # Whisper's file gives a rank to the empty token, as "=": no text leads to it, but it counts.
            token = base64.b64decode(encoded, validate=True) if encoded != b"=" else b""
            if not rank.isdigit() or len(rank) > _MOST_DIGITS:
                raise ValueError
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number} is no line of a tiktoken file, a token in base64 and its rank") from None
        if token in ranks:
            raise UserError(f"{path}:{number} has a token that an earlier line has")
        ranks[token] = int(rank)
    if not ranks:
        raise UserError(f"{path} is empty")
    _refuse_equal(path, ranks)
    return ranks


def _refuse_equal(path: Path, ranks: Mapping[bytes, int]) -> None:
    """Two tokens of one rank would be one number."""
    if twice := [rank for rank, count in Counter(ranks.values()).items() if count > 1]:
        raise UserError(f"{path} gives the rank {twice[0]} to more than one token")


def _read_tekken(
    path: Path, content: bytes, special: Sequence[str], pattern: str | None
) -> tuple[dict[bytes, int], int, dict[str, int], str]:
    """Ranks, what is added to them for a token's number, special tokens, and how texts are cut."""
    try:
        described: Mapping[str, Any] = parse_json(content)
        config = described["config"]
        reserved = int(config["default_num_special_tokens"])
        count = int(config["default_vocab_size"]) - reserved
        ranks = {
            base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"])
            for entry in described["vocab"][:count]
        }
        named = {int(entry["rank"]): str(entry["token_str"]) for entry in described.get("special_tokens") or ()}
        pattern = pattern or str(config["pattern"])
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise UserError(f"{path} is neither a tiktoken file nor a tekken.json ({one_line(error)})") from None
    _refuse_equal(path, ranks)
    if not named:
        if not special:
            raise UserError(
                f"{path} does not name its {counted(reserved, 'special token')}: give the first ones in order"
            )
        named = dict(enumerate(special))
    elif special:
        raise UserError(f"--special-tokens: {path} names its own")
    if beyond := [token for number, token in named.items() if number >= reserved]:
        raise UserError(f"{path} has room for {counted(reserved, 'special token')}, and none for {beyond[0]}")
    own = {named.get(number, f"<SPECIAL_{number}>"): number for number in range(reserved)}
    return ranks, reserved, own, pattern


def _described(ranks: Mapping[bytes, int], shift: int, own: Mapping[str, int], pattern: str) -> str:
    alphabet = {byte[0]: character for character, byte in byte_alphabet().items()}
    spelled = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = [
        [spelled[token[:cut]], spelled[token[cut:]]]
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in sorted(
            (cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks),
            key=lambda cut, token=token: (ranks[token[:cut]], ranks[token[cut:]]),  # type: ignore[misc]
        )
    ]
    vocabulary = {**own, **{spelled[token]: rank + shift for token, rank in ranks.items() if token}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in own.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
        "post_processor": None,
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return json.dumps(described, ensure_ascii=False)
