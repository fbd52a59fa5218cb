"""A SentencePiece model as the files that transformers' `AutoTokenizer` loads, and back.

`tokenizer.json` (the format of the `tokenizers` package) is written directly. SentencePiece's BPE joins, again and
again, the neighbours whose joint piece has the highest score; there, the same is a list of joinable pairs in order of
preference. Tokens that a user defined are cut out of the text first, on both sides.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.data.tokenizer import Tokenizer, companions

_SPACE = "\u2581"  # SentencePiece's own mark for one
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # types of pieces
_BPE = 2  # type of model
_NAME = "tokenizer.model"


@dataclass(frozen=True)
class TokenizerFiles:
    """Files of an exported folder by name, and `bos_token_id` and the like for its `config.json`."""

    contents: dict[str, bytes] = field(default_factory=dict)
    token_ids: dict[str, int] = field(default_factory=dict)


def tokenizer_files(path: Path | None, model: ModelConfig, chat_template: str | None) -> TokenizerFiles:
    """What `AutoTokenizer` needs, from a SentencePiece model.

    Args:
        path: the model; None: a folder without a tokenizer.
        model: its vocabulary must have the tokenizer's size.
        chat_template: Jinja.

    Raises:
        UserError: not a BPE model as `tools/train_tokenizer.py` makes them, or of another vocabulary.
    """
    if path is None:
        if chat_template:
            raise UserError("--chat-template needs a tokenizer; name it with --tokenizer")
        return TokenizerFiles()
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, the model {model.vocab_size};"
            " give the one that the model was trained with (--tokenizer)"
        )
    proto = _parse(tokenizer)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id, "pad_token": tokenizer.pad_id}
    named = {name: proto.pieces[i].piece for name, i in ids.items() if i >= 0}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "unk_token": proto.pieces[tokenizer.unk_id].piece,
        "model_max_length": model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    if chat_template:
        settings["chat_template"] = chat_template
    contents = {
        _NAME: tokenizer.proto,
        "tokenizer.json": _json(_tokenizer_json(proto, tokenizer)),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json({**named, "unk_token": settings["unk_token"]}),
    }
    return TokenizerFiles(contents, {f"{name}_id": i for name, i in ids.items() if i >= 0})


def import_tokenizer(folder: Path, run: Path, vocab_size: int) -> str | None:
    """Copy a folder's SentencePiece model, and what is beside it for prompts, into a run folder.

    Returns:
        None, or why there is none.
    """
    path = folder / _NAME
    if not path.is_file():
        return "it has no SentencePiece model (tokenizer.model): set data.tokenizer to train on"
    size = Tokenizer(path).vocab_size
    if size != vocab_size:
        return f"its tokenizer.model has {size} tokens, the model {vocab_size}: tokens were added that it lacks"
    for file in (path, *companions(path)):
        shutil.copyfile(file, run / file.name)
    return None


def _parse(tokenizer: Tokenizer) -> Any:
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which the rest of the package does not

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.proto)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    reasons = {
        "its type is not BPE": trainer.model_type != _BPE,
        "it normalizes text (use the rule `identity`)": bool(normalizer.precompiled_charsmap),
        "it removes extra whitespace": normalizer.remove_extra_whitespaces,
        "it has no byte fallback": not trainer.byte_fallback,
        "it marks spaces at the end of words": trainer.treat_whitespace_as_suffix,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(
                f"the tokenizer {tokenizer.path} cannot be converted: {reason};"
                " leave it out with --tokenizer none and add its files by hand"
            )
    return proto


def _tokenizer_json(proto: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    added = [
        {
            "id": i,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            # Special ones have no text when decoded; a user's own symbols stand for themselves.
            "special": piece.type != _USER_DEFINED,
        }
        for i, piece in enumerate(proto.pieces)
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if proto.normalizer_spec.add_dummy_prefix:
        spaces = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, spaces]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": spaces,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.pieces[tokenizer.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in _merges(proto)],
        },
    }


def _merges(proto: Any) -> Iterator[tuple[str, str]]:
    """Joinable pairs, best first: by the score of what they make, then by its number."""
    normal = {piece.piece: (-piece.score, i) for i, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    for joined in sorted(normal, key=lambda piece: normal[piece]):
        for cut in range(1, len(joined)):
            pair = joined[:cut], joined[cut:]
            if pair[0] in normal and pair[1] in normal:
                yield pair


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"
