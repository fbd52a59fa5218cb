"""Tokens of the user's own in an imported model: in the files of its tokenizer, and as rows of its tables.

A new token takes the first number that the tokenizer leaves free. Where the model's vocabulary was padded beyond its
tokenizer that is a row it has; else its tables grow. Either way the row becomes the mean of all rows that texts could
lead to before, so that at first the token is as likely, and as like the others, as one can be that nobody has seen
(https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from vishwamai_mp.config import UserError
from vishwamai_mp.config.files import written_whole
from vishwamai_mp.conversion.dtypes import FP32
from vishwamai_mp.conversion.folder import Folder
from vishwamai_mp.conversion.mapping import Mapped, Part
from vishwamai_mp.conversion.rows import RowReader, pieces_of
from vishwamai_mp.conversion.safetensors_files import Entry, read_header
from vishwamai_mp.data.json_vocabulary import SETTINGS_FILE, add_tokens_beside, read_settings
from vishwamai_mp.data.tokenizer import ADDED_TOKENS_FILE, JSON_FILE, MODEL_FILE, Tokenizer

_SUFFIX = ".new_tokens"  # behind the name of a table, for its new rows
_USER_DEFINED = 4  # the type of a piece that texts spell


@dataclass(frozen=True)
class NewTokens:
    """What becomes of a tokenizer.

    Attributes:
        files: all that a run keeps of it, by name.
        ids: of the new tokens, from `known` on.
        known: tokens that it had.
    """

    files: Mapping[str, bytes]
    ids: Mapping[str, int]
    known: int


def with_new_tokens(files: Sequence[Path], tokens: Sequence[str]) -> NewTokens:
    """Add tokens to a tokenizer. Each is found wherever it stands in a text, and decodes to itself.

    Args:
        files: of one folder, as `imported_files` has them: one of them is the tokenizer's own.
        tokens: their spellings, each once.

    Raises:
        UserError: no tokenizer, or a token that it has, that is blank, or that it would not find in a text.
    """
    by_name = {file.name: file for file in files}
    if not by_name.keys() & {MODEL_FILE, JSON_FILE}:
        raise UserError("--add-tokens needs the model's tokenizer, and the folder has none that can be used here")
    contents = {name: file.read_bytes() for name, file in by_name.items() if name not in (MODEL_FILE, JSON_FILE)}
    name = JSON_FILE if JSON_FILE in by_name else MODEL_FILE
    tokenizer = Tokenizer(by_name[name])
    _check(tokenizer, tokens)
    ids = {token: tokenizer.vocab_size + number for number, token in enumerate(tokens)}
    add = _in_json if name == JSON_FILE else _in_sentencepiece
    contents[name] = add(by_name[name], ids)
    if SETTINGS_FILE in contents:
        settings = read_settings(by_name[SETTINGS_FILE])
        if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
            decoder |= {str(i): _described(token) for token, i in ids.items()}
        contents[SETTINGS_FILE] = _text(settings)
    before = read_settings(by_name[ADDED_TOKENS_FILE]) if ADDED_TOKENS_FILE in by_name else {}
    contents[ADDED_TOKENS_FILE] = _text({**before, **ids})
    return NewTokens(contents, ids, tokenizer.vocab_size)


def with_new_rows(folder: Folder, tokens: NewTokens) -> Folder:
    """The folder with a vocabulary that holds the tokens; `write_new_rows` makes what its tables lack."""
    size = max(folder.config.model.vocab_size, tokens.known + len(tokens.ids))
    config = replace(folder.config, model=replace(folder.config.model, vocab_size=size))
    table = [_grown(mapped, size, tokens) if mapped.is_vocabulary else mapped for mapped in folder.mapping]
    return replace(folder, config=config, mapping=table)


def write_new_rows(folder: Folder, tokens: NewTokens, path: Path) -> dict[str, Entry]:
    """Write the rows that `with_new_rows` asks for to a safetensors file, unless it is there already.

    Args:
        folder: as it was opened.
        tokens: the new ones.
        path: of the file.

    Returns:
        the tensors by name.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        reader = RowReader(folder)
        rows = {}
        for mapped in folder.mapping:
            if mapped.is_vocabulary:
                mean = _mean(reader, mapped, min(tokens.known, mapped.shape[0]))
                rows[mapped.parts[0].name + _SUFFIX] = mean.repeat(len(tokens.ids), 1)
        reader.close()
        with written_whole(path) as partial:
            save_file(rows, partial)
    return read_header(path)


def _check(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    for number, token in enumerate(tokens):
        if not token or not token.isprintable() or any(character.isspace() for character in token):
            raise UserError(f"--add-tokens {token!r}: write it of printable characters, without spaces")
        if token in tokens[:number]:
            raise UserError(f"--add-tokens {token}: is named twice")
        if (found := tokenizer.find(token)) is not None and found != tokenizer.unk_id:
            raise UserError(f"--add-tokens {token}: {tokenizer.path} has it already, as {found}; leave it out")


def _in_json(path: Path, ids: Mapping[str, int]) -> bytes:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(path))
    add_tokens_beside(library, path)
    library.add_tokens([AddedToken(token, special=False, normalized=False) for token in ids])
    if {token: library.token_to_id(token) for token in ids} != ids:
        raise UserError(f"--add-tokens: {path} leaves out numbers between its tokens, so none can be added behind them")
    return library.to_str(pretty=True).encode() + b"\n"


def _in_sentencepiece(path: Path, ids: Mapping[str, int]) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    for token in ids:
        proto.pieces.add(piece=token, score=0.0, type=_USER_DEFINED)
    return proto.SerializeToString()


def _described(token: str) -> dict[str, object]:
    sides = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    return {"content": token, **sides}


def _text(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"


def _grown(mapped: Mapped, size: int, tokens: NewTokens) -> Mapped:
    """The table with its new rows, which lie over those that its padding may have there."""
    (whole,) = mapped.parts
    first, width = tokens.known, mapped.shape[1]
    new = Part(whole.name + _SUFFIX, (len(tokens.ids), width), ((first, first + len(tokens.ids)),))
    return replace(mapped, shape=(size, width), parts=(whole, new))


def _mean(reader: RowReader, mapped: Mapped, count: int) -> Tensor:
    """The mean of a table's first rows, [hidden]."""
    total = torch.zeros(mapped.shape[1], dtype=torch.float64)
    for piece in pieces_of(mapped, FP32):
        if piece.first < count:
            total += reader.read(piece)[: count - piece.first].sum(0, dtype=torch.float64)
    return (total / count).float()
