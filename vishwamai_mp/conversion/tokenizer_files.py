"""A tokenizer as the files that transformers' `AutoTokenizer` loads, and back.

A `tokenizer.json` (the format of the `tokenizers` package) is copied as it is. Of a SentencePiece model one is written:
SentencePiece's BPE joins, again and again, the neighbours whose joint piece has the highest score; there, the same is a
list of joinable pairs in order of preference. Tokens that a user defined are cut out of the text first, on both sides.
One thing differs on purpose, as in every tokenizer of transformers: where a text spells a control token such as `</s>`,
that is the token.

An import keeps the folder's own tokenizer files, its `generation_config.json` and its chat template as they are, in the
run folder; training that is given a tokenizer there copies them along, and an export writes them again.
`generation_config.json` there also has the token ids that only `config.json` had.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vishwamai_mp.config import ModelConfig, UserError
from vishwamai_mp.config.errors import one_line
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe
from vishwamai_mp.conversion.model_config import token_ids
from vishwamai_mp.data.file_kinds import foreign_tokenizer
from vishwamai_mp.data.json_vocabulary import SETTINGS_FILE, read_settings
from vishwamai_mp.data.spelled_tokens import lacking
from vishwamai_mp.data.tokenizer import (
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
    JSON_FILE,
    MODEL_FILE,
    Tokenizer,
    companions,
    has_tokenizer,
    tokenizer_file,
)

_SPACE = "\u2581"  # SentencePiece's own mark for one
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # types of pieces
_BPE = 2  # type of model
_MOST_TOLD = 8  # added tokens
NAMED_TEMPLATES = "additional_chat_templates"  # a folder
_CUT_TEXTS = ("Hello world", "The end.\nThe  end", "12 345", "na\u00efve \ufb01sh \u6771\u4eac")


@dataclass(frozen=True)
class TokenizerFiles:
    """Files of an exported folder by name, and `bos_token_id` and the like for its `config.json`."""

    contents: dict[str, bytes] = field(default_factory=dict)
    token_ids: dict[str, int] = field(default_factory=dict)

    def added(self) -> str:
        """The tokens of `added_tokens.json` with their ids, a few where they are many; nothing without that file."""
        tokens = sorted(json.loads(self.contents.get(ADDED_TOKENS_FILE, b"{}")).items(), key=lambda pair: pair[1])
        more = f" and {len(tokens) - _MOST_TOLD} more" if len(tokens) > _MOST_TOLD else ""
        return ", ".join(f"{token} ({i})" for token, i in tokens[-_MOST_TOLD:]) + more


def tokenizer_of_run(run: Path) -> Path | None:
    """The tokenizer that a run folder keeps; None: it has none."""
    return tokenizer_file(run) if has_tokenizer(run) else None


def tokenizer_files(
    path: Path | None, model: ModelConfig, chat_template: str | None, imported: bool = False
) -> TokenizerFiles:
    """What `AutoTokenizer` needs: the files that are there already, or else made from a SentencePiece model.

    Args:
        path: of the tokenizer, as `Tokenizer` has it; None: a folder without one.
        model: its vocabulary must have all of the tokenizer's tokens.
        chat_template: Jinja; takes the place of an imported one.
        imported: whether files beside a SentencePiece model belong to it, as in a run folder. Those beside a
            `tokenizer.json` always do.

    Raises:
        UserError: more tokens than the model's, or without imported files not a model that they can be made from.
    """
    if path is None:
        if chat_template:
            raise UserError("--chat-template needs a tokenizer; name it with --tokenizer")
        return TokenizerFiles()
    tokenizer = Tokenizer(path)
    tokenizer.check_fits(model.vocab_size)
    beside = companions(tokenizer.path) if imported or tokenizer.proto is None else []
    contents = {file.name: file.read_bytes() for file in beside if file.name != GENERATION_FILE}
    settings = _read_json(tokenizer.path.with_name(SETTINGS_FILE)) if SETTINGS_FILE in contents else {}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id, "pad_token": tokenizer.pad_id}
    ids = {name: i for name, i in ids.items() if i >= 0}
    if tokenizer.proto is None:
        is_whole = bool(settings)
        contents[JSON_FILE] = tokenizer.path.read_bytes()
        if not is_whole:
            settings = _common_settings(tokenizer, ids, model)
    else:
        is_whole = JSON_FILE in contents or "tokenizer_class" in settings
        contents[MODEL_FILE] = tokenizer.proto
        if not is_whole:
            proto = _parse(tokenizer)
            settings = {**_default_settings(proto, tokenizer, ids, model), **settings}
            contents[JSON_FILE] = _json(_tokenizer_json(proto, tokenizer, settings))
    if chat_template:
        settings["chat_template"] = chat_template
        contents.pop(CHAT_TEMPLATE_FILE, None)
    if chat_template or not is_whole:
        contents[SETTINGS_FILE] = _json(settings)
    return TokenizerFiles(contents, {f"{name}_id": i for name, i in ids.items()})


def generation_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's `generation_config.json`, with the token ids of its `config.json` where it has none."""
    content = _read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).is_file() else {}
    return {**token_ids(config), **{key: value for key, value in content.items() if value is not None}}


def imported_files(folder: Path, vocab_size: int, added: int = 0) -> tuple[list[Path], str | None]:
    """Files of a folder that its run folder keeps, and what is to be known of its tokenizer.

    Args:
        folder: the Hugging Face folder.
        vocab_size: the model's.
        added: tokens that it is given besides: to its `tokenizer.json`, if it has one.

    Raises:
        UserError: a `tokenizer.model` that is damaged.
    """
    path, beside = folder / MODEL_FILE, companions(folder / MODEL_FILE)
    notes, files = [], [file for file in beside if file.name != JSON_FILE]
    described = next((file for file in beside if file.name == JSON_FILE), None)
    choices = [file for file in (path, described) if file is not None and file.is_file()]
    if choices and choices[0] == path and (kind := foreign_tokenizer(path.read_bytes())):
        notes.append(f"its {MODEL_FILE} is {kind}, and is left behind (tools/convert_tokenizer.py converts it)")
        choices.remove(path)
    sizes = {file: Tokenizer(file).vocab_size for file in choices}
    for file, size in sizes.items():
        if size > vocab_size:
            notes.append(f"its {file.name} has {size} tokens, the model only {vocab_size}, and is left behind")
            choices.remove(file)
    if len(choices) > 1 and (added or sizes[path] < sizes[choices[1]]):
        notes.append(f"its {MODEL_FILE} lacks tokens that its {JSON_FILE} has, and is left behind")
        choices.remove(path)
    if len(choices) > 1 and (text := _cut_otherwise(*choices)):
        notes.append(
            f"its {MODEL_FILE} cuts {text!r} otherwise than its {JSON_FILE}, transformers' choice, and is left behind"
        )
        choices.remove(path)
    if not choices:
        notes.append("it has no tokenizer that can be used here: set data.tokenizer to train on texts")
    elif (size := sizes[choices[0]] + added) < vocab_size:
        new = f", {added} new ones among them" if added else ""
        notes.append(
            f"its {choices[0].name} has {size} tokens{new}, the model {vocab_size}: no text here leads to those beyond"
        )
    if choices and (unknown := lacking(Tokenizer(choices[0]))):
        more = f" and {len(unknown) - _MOST_TOLD} more" if len(unknown) > _MOST_TOLD else ""
        notes.append(
            f"its {choices[0].name} lacks tokens that files beside it add, and cuts them like any text:"
            f" {', '.join(unknown[:_MOST_TOLD])}{more}"
        )
    return [*choices, *files], "; ".join(notes) or None


def _cut_otherwise(model_file: Path, json_file: Path) -> str | None:
    """A text that two tokenizers with the same tokens cut differently; None where none of a few is.

    None of these begins with a space: of a SentencePiece model's own space before a text and such a space, libraries
    make one or two.
    """
    one, other = Tokenizer(model_file), Tokenizer(json_file)
    return next((text for text in _CUT_TEXTS if one.encode(text) != other.encode(text)), None)


def without_code(contents: Mapping[str, bytes], folder: Path) -> tuple[dict[str, bytes], str | None]:
    """A tokenizer's files by name without what would have transformers run Python code that lies in their folder.

    Args:
        contents: of the files.
        folder: theirs, for messages.

    Returns:
        the files, and what the user should know.
    """
    settings = read_settings(folder / SETTINGS_FILE) if SETTINGS_FILE in contents else {}
    if not settings.get("auto_map"):
        return dict(contents), None
    kept = {key: value for key, value in parse_json(contents[SETTINGS_FILE]).items() if key != "auto_map"}
    if JSON_FILE in contents:
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"  # its own class is that code
    note = (
        f"its {SETTINGS_FILE} names Python code (auto_map), which is not run and left out; texts may be cut otherwise"
    )
    return {**contents, SETTINGS_FILE: _json(kept)}, note


def named_templates(folder: Path) -> list[Path]:
    """Files in which transformers 5 keeps chat templates that have another name than "default"; none in a folder
    without `tokenizer_config.json`, where a run keeps them."""
    found = sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))
    return found if (folder / SETTINGS_FILE).is_file() else []


def with_named_templates(contents: Mapping[str, bytes], folder: Path) -> dict[str, bytes]:
    """A tokenizer's files by name, with all chat templates in `tokenizer_config.json` where some are `named_templates`:
    every version of transformers reads them there.

    Raises:
        UserError: one of them cannot be read.
    """
    others = named_templates(folder)
    if not others or SETTINGS_FILE not in contents:
        return dict(contents)
    default = [folder / CHAT_TEMPLATE_FILE] if CHAT_TEMPLATE_FILE in contents else []
    templates = [{"name": "default", "template": _text_of(file)} for file in default]
    templates += [{"name": file.stem, "template": _text_of(file)} for file in others]
    kept = {name: content for name, content in contents.items() if name != CHAT_TEMPLATE_FILE}
    return {**kept, SETTINGS_FILE: _json({**parse_json(contents[SETTINGS_FILE]), "chat_template": templates})}


def _text_of(path: Path) -> str:
    try:
        refuse_pointer_or_pipe(path)
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); mend it or take it away") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def _common_settings(tokenizer: Tokenizer, ids: Mapping[str, int], model: ModelConfig) -> dict[str, Any]:
    """`tokenizer_config.json` as far as it is the same for all kinds of tokenizers."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.id_to_token(i) for name, i in ids.items()},
        "model_max_length": model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }


def _default_settings(proto: Any, tokenizer: Tokenizer, ids: Mapping[str, int], model: ModelConfig) -> dict[str, Any]:
    """`tokenizer_config.json`; llama.cpp's converter takes prefix space and the types of tokens from it."""
    return {
        **_common_settings(tokenizer, ids, model),
        "unk_token": tokenizer.id_to_token(tokenizer.unk_id),
        "add_prefix_space": proto.normalizer_spec.add_dummy_prefix,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in _added_tokens(proto)
        },
        "add_bos_token": False,
        "add_eos_token": False,
    }


def _parse(tokenizer: Tokenizer) -> Any:
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which the rest of the package does not

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.proto)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    spaced = [symbol for symbol in symbols if " " in symbol or _SPACE in symbol]
    equal: dict[float, list[str]] = {}
    for piece in proto.pieces:
        if piece.type == _NORMAL and len(piece.piece) > 1:
            equal.setdefault(piece.score, []).append(piece.piece)
    reasons = {
        "its type is not BPE": trainer.model_type != _BPE,
        "it normalizes text (use the rule `identity`)": bool(normalizer.precompiled_charsmap),
        "it changes text that it decodes": bool(proto.denormalizer_spec.precompiled_charsmap),
        "it removes extra whitespace": normalizer.remove_extra_whitespaces,
        "it does not mark spaces": not normalizer.escape_whitespaces,
        "it marks spaces at the end of words": trainer.treat_whitespace_as_suffix,
        "it has no byte fallback": not trainer.byte_fallback,
        "it has pieces that are not used": any(piece.type == _UNUSED for piece in proto.pieces),
        "several of its pieces have one score, and SentencePiece then goes from left to right": any(
            len(pieces) > 1 and not _repeat_one_character(pieces) for pieces in equal.values()
        ),
        f"its symbol {spaced[:1]} has a space, which transformers finds before spaces are marked": bool(spaced),
        f"it puts a space before a text, also where that begins with a symbol of its own such as {symbols[:1]};"
        " transformers has no such rule": normalizer.add_dummy_prefix and bool(symbols),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(
                f"the tokenizer {tokenizer.path} cannot be converted: {reason};"
                " leave it out with --tokenizer none and add its files by hand"
            )
    return proto


def _added_tokens(proto: Any) -> list[dict[str, Any]]:
    return [
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


def _tokenizer_json(proto: Any, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
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
        "added_tokens": _added_tokens(proto),
        "normalizer": spaces,
        "pre_tokenizer": None,
        "post_processor": _ends(settings, vocabulary),
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


def _ends(settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, Any] | None:
    """What puts BOS and EOS around a text, where the settings ask for it."""
    sides = {side: settings[f"{side}_token"] for side in ("bos", "eos") if settings.get(f"add_{side}_token")}
    if not sides:
        return None
    marks = {side: [{"SpecialToken": {"id": token, "type_id": 0}}] for side, token in sides.items()}
    text = [*marks.get("bos", []), {"Sequence": {"id": "A", "type_id": 0}}, *marks.get("eos", [])]
    tokens = {name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]} for name in sides.values()}
    return {"type": "TemplateProcessing", "single": text, "pair": text, "special_tokens": tokens}


def _repeat_one_character(pieces: Iterable[str]) -> bool:
    return len(set("".join(pieces))) == 1


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Joinable pairs, best first: by the score of what they make, then those with the longest first part.

    Of equal scores SentencePiece takes the leftmost. Llama's runs of spaces have one: from the left, a run grows by a
    space at a time as far as there are pieces, and then the next one begins. Longest first part first does the same,
    for the part that grows is the longest of those that can.
    """
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    cuts = ((joined[:cut], joined[cut:]) for joined in normal for cut in range(1, len(joined)))
    pairs = [pair for pair in cuts if pair[0] in normal and pair[1] in normal]
    return sorted(pairs, key=lambda pair: (-normal["".join(pair)], -len(pair[0])))


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"
