"""Tells apart the kinds of tokenizer files that go by one name."""

import base64
import binascii

from vishwamai_mp.config.json_text import parse_json


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
            parse_json(content)
        except ValueError:
            return None
        return "JSON, such as the tokenizer.json of Hugging Face's tokenizers"
    return None
