"""Tells apart files that go by one name: what `git clone` leaves without git-lfs, and the kinds of tokenizer files."""

import base64
import binascii
import json
from pathlib import Path

from vishwamai_mp.config.errors import UserError

_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_POINTER_BYTES = 1024  # git-lfs's own limit


def refuse_pointer(path: Path) -> None:
    """Raise `UserError` where `path` is what git-lfs puts in place of a large file that it has not downloaded."""
    with path.open("rb") as file:
        content = file.read(_MOST_POINTER_BYTES + 1)
    if content.startswith(_POINTER) and len(content) <= _MOST_POINTER_BYTES:
        raise UserError(f"{path} is a git-lfs pointer, its content was not downloaded: run git lfs pull in its folder")


def foreign_tokenizer(content: bytes) -> str | None:
    """What a tokenizer's file is that is no SentencePiece model, in words; None: of no kind that is known here."""
    first = content[:65536].split(b"\n", 1)[0].split()
    if len(first) == 2 and first[1].isdigit():
        try:
            base64.b64decode(first[0], validate=True)
        except binascii.Error:
            return None
        return "a tiktoken file (base64 and rank in each line, as Llama 3's)"
    if content[:65536].lstrip().startswith(b"{"):
        try:
            json.loads(content)
        except ValueError:
            return None
        return "JSON, such as the tokenizer.json of Hugging Face's tokenizers"
    return None
