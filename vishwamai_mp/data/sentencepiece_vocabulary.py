"""The vocabulary in a SentencePiece `.model` file."""

import re
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_pb2 import SentencePieceText  # type: ignore[attr-defined]

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.data.file_kinds import foreign_tokenizer

_SPACE = "\u2581"  # SentencePiece's own mark for one


class SentencePieceVocabulary:
    """See `tokenizer.Vocabulary`. Control tokens are never found in a text.

    Args:
        path: of the file, for messages.
        content: the file's.
    """

    puts_bos_first: bool | None = None  # such a file does not say
    cuts_at_spaces = False  # `piece_cache` reads more from the model itself

    def __init__(self, path: Path, content: bytes) -> None:
        self.proto: bytes | None = content
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.size: int = self._processor.get_piece_size()
            self._processor.id_to_piece(list(range(self.size)))  # all of them are UTF-8
        except (RuntimeError, ValueError, OSError) as error:
            if kind := foreign_tokenizer(content):
                raise UserError(
                    f"tokenizer {path} is {kind}: use a SentencePiece model or the tokenizer.json of Hugging Face's"
                    " tokenizers, which tools/convert_tokenizer.py makes of tiktoken files"
                ) from error
            raise UserError(f"tokenizer {path} is not a whole SentencePiece model: make it again") from error
        self.unk_id: int = self._processor.unk_id()
        if self.unk_id < 0:  # SentencePiece reads it, and writes -1 for what it does not know
            raise UserError(f"tokenizer {path} is not a whole SentencePiece model (no unknown piece): make it again")
        self.bos_id: int = self._processor.bos_id()
        self.eod_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]  # SentencePiece's own batch call starts threads, and is slower

    def encode_placed(self, text: str) -> list[tuple[int, int, int]]:
        found = SentencePieceText.FromString(self._processor.encode(text, out_type="serialized_proto"))
        # Its places count bytes. A character is where its first byte is: all but 10xxxxxx are first.
        firsts = (np.frombuffer(text.encode(), dtype=np.uint8) & 0xC0) != 0x80
        characters = [0, *np.cumsum(firsts).tolist()]
        return [(piece.id, characters[piece.begin], characters[piece.end]) for piece in found.pieces]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def spelling(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def find(self, token: str) -> int | None:
        try:
            token.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and no vocabulary holds
            return None
        token_id = self._processor.piece_to_id(token)
        return None if token_id == self.unk_id and self._processor.id_to_piece(self.unk_id) != token else token_id

    def content_of(self, token_id: int) -> bytes:
        spelled = self.spelling(token_id)
        if self._processor.is_byte(token_id) and re.fullmatch(r"<0x[0-9A-F]{2}>", spelled):
            return bytes([int(spelled[3:5], 16)])
        return spelled.replace(_SPACE, " ").encode()

    def control_tokens(self) -> dict[str, int]:
        return {self.spelling(i): i for i in range(self.size) if self._processor.is_control(i)}

    def has_byte_fallback(self) -> bool:
        return sum(self._processor.is_byte(i) for i in range(self.size)) == 256
