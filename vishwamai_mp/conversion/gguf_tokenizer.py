"""A folder's tokenizer as a GGUF file holds it.

llama.cpp has its own two programs for it: SentencePiece's byte pairs ("llama"), which join the neighbours whose joint
piece scores highest, and GPT-2's byte-level ones ("gpt2"), which follow a list of merges after cutting a text by a rule
that is one of a list in its sources, by name. A tokenizer that neither computes is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vishwamai_mp.config import UserError
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.data.json_vocabulary import SETTINGS_FILE, JsonVocabulary, read_settings
from vishwamai_mp.data.tokenizer import CHAT_TEMPLATE_FILE, GENERATION_FILE, JSON_FILE, Tokenizer, has_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # as SentencePiece's types of pieces
_UNIGRAM = 1  # a type of SentencePiece model
_WORDS = "'s|'t|'re|'ve|'m|'ll|'d"
_CL100K = (
    r"(?i:{words})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = "digits alone"
# How a text is cut before merging: patterns, and whether GPT-2's own comes last. llama.cpp's name of it.
_CUTS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((), True): "gpt-2",
    ((_DIGITS,), True): "smollm",
    ((_CL100K.format(words=_WORDS, digits="{1,3}"),), False): "dbrx",
    ((_CL100K.format(words=_WORDS, digits=""),), False): "qwen2",
}
_FURTHER_ENDS = ("eot", "eom")  # of a turn and of a message: llama.cpp ends a text at each of them
_MEND = "leave it out with --tokenizer none"


@dataclass(frozen=True)
class GgufTokenizer:
    """Keys of a GGUF file behind `tokenizer.`: lists are of bytes, numbers or texts. And what the user should know."""

    keys: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Path, vocab_size: int) -> GgufTokenizer:
    """The tokenizer in an exported folder; nothing but "none" where it has none.

    Args:
        folder: with `tokenizer.model` or `tokenizer.json`.
        vocab_size: the model's; tokens beyond the tokenizer's are unused ones.

    Raises:
        UserError: one that llama.cpp would compute otherwise.
    """
    if not has_tokenizer(folder):
        return GgufTokenizer({"ggml.model": "none"})
    tokenizer, settings = Tokenizer(folder), read_settings(folder / SETTINGS_FILE)
    described = parse_json((folder / JSON_FILE).read_bytes()) if (folder / JSON_FILE).is_file() else {}
    if isinstance(tokenizer.vocabulary, JsonVocabulary):
        described = tokenizer.vocabulary.described
    if tokenizer.proto is not None:
        keys = _of_sentencepiece(tokenizer)
    elif described.get("model", {}).get("type") != "BPE":
        raise UserError(f"--gguf: the tokenizer of {folder} is no BPE; {_MEND}")
    elif described["model"].get("byte_fallback"):
        keys = _of_fallback(tokenizer, described)
    else:
        keys = _of_bytes(tokenizer, described)
    _add_own(keys, described)
    missing = vocab_size - len(keys["ggml.tokens"])
    keys["ggml.tokens"] += [f"[PAD{vocab_size - missing + number}]".encode() for number in range(missing)]
    keys["ggml.token_type"] += [_UNUSED] * missing
    if "ggml.scores" in keys:
        keys["ggml.scores"] += [-10000.0] * missing
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eod_id, "padding": tokenizer.pad_id, "unknown": tokenizer.unk_id}
    keys |= {f"ggml.{name}_token_id": i for name, i in ids.items() if i >= 0}
    begins = tokenizer.vocabulary.puts_bos_first
    begins = settings.get("add_bos_token") if begins is None else begins
    keys["ggml.add_bos_token"] = bool(begins) and tokenizer.bos_id >= 0
    keys["ggml.add_eos_token"] = bool(settings.get("add_eos_token"))
    ends = _further_ends(folder, tokenizer)
    keys |= {f"ggml.{name}_token_id": i for name, i in zip(_FURTHER_ENDS, ends, strict=False)}
    beyond = ends[len(_FURTHER_ENDS) :]
    notes = (f"tokens {beyond} of {GENERATION_FILE} end no text there: llama.cpp reads three",) if beyond else ()
    return GgufTokenizer(keys | _chat_templates(folder, settings), notes)


def _further_ends(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a text, as `generation_config.json` has them, besides the tokenizer's EOS."""
    ends = read_settings(folder / GENERATION_FILE).get("eos_token_id")
    known = set(range(tokenizer.vocab_size)) - {tokenizer.eod_id}
    return [i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int and i in known]


def _of_sentencepiece(tokenizer: Tokenizer) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.proto)
    normalizer = proto.normalizer_spec
    reasons = {
        "is a unigram model": proto.trainer_spec.model_type == _UNIGRAM,
        "normalizes text": bool(normalizer.precompiled_charsmap),
        "marks spaces at the end of words": proto.trainer_spec.treat_whitespace_as_suffix,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"--gguf: the tokenizer {tokenizer.path} {reason}, and llama.cpp's does not; {_MEND}")
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [piece.piece.encode() for piece in proto.pieces],
        "ggml.scores": [piece.score for piece in proto.pieces],
        "ggml.token_type": [piece.type for piece in proto.pieces],
        "ggml.add_space_prefix": normalizer.add_dummy_prefix,
        "ggml.remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
    }


def _of_fallback(tokenizer: Tokenizer, described: Mapping[str, Any]) -> dict[str, Any]:
    """Of SentencePiece's byte pairs as a `tokenizer.json` has them: a piece scores by its first merge."""
    model = described["model"]
    spellings = tokenizer.tokens()
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_pairs(model)):
        ranks.setdefault("".join(pair), rank)
    kinds = [_NORMAL] * len(spellings)
    for i, spelling in enumerate(spellings):
        if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
            kinds[i] = _BYTE
        elif i == tokenizer.unk_id:
            kinds[i] = _UNKNOWN
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [spelling.encode() for spelling in spellings],
        "ggml.scores": [-float(ranks.get(spelling, len(ranks))) for spelling in spellings],
        "ggml.token_type": kinds,
        "ggml.add_space_prefix": '"Prepend"' in str(described.get("normalizer")).replace("'", '"'),
        "ggml.remove_extra_whitespaces": False,
    }


def _of_bytes(tokenizer: Tokenizer, described: Mapping[str, Any]) -> dict[str, Any]:
    spellings = tokenizer.tokens()
    return {
        "ggml.model": "gpt2",
        "ggml.pre": _cut(tokenizer, described),
        "ggml.tokens": [
            (spelling or f"[PAD{i}]").encode() for i, spelling in enumerate(spellings)
        ],  # a number left out has no spelling
        "ggml.token_type": [_NORMAL if spelling else _UNUSED for spelling in spellings],
        "ggml.merges": [" ".join(pair) for pair in _pairs(described["model"])],
    }


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges, which are written as pairs or with a space between."""
    halves = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in halves]


def _cut(tokenizer: Tokenizer, described: Mapping[str, Any]) -> str:
    """llama.cpp's name of how texts are cut."""
    outer = described.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    patterns: list[str] = []
    last, understood = False, bool(outer)
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} if not step.get("invert"):
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(_DIGITS)
            case {"type": "ByteLevel"} if not step.get("add_prefix_space"):
                last = step.get("use_regex", True)
            case _:
                understood = False
    name = _CUTS.get((tuple(patterns), last)) if understood else None
    if name is None:
        raise UserError(
            f"--gguf: the tokenizer {tokenizer.path} cuts texts in a way that is not known to be llama.cpp's; {_MEND}"
        )
    return "llama-bpe" if name == "dbrx" and described["model"].get("ignore_merges") else name


def _add_own(keys: dict[str, Any], described: Mapping[str, Any]) -> None:
    """Added tokens, which are found before a text is cut."""
    tokens, kinds = keys["ggml.tokens"], keys["ggml.token_type"]
    for token in described.get("added_tokens", []):
        while len(tokens) <= token["id"]:
            tokens.append(f"[PAD{len(tokens)}]".encode())
            kinds.append(_UNUSED)
            keys.get("ggml.scores", []).append(-10000.0)
        tokens[token["id"]] = token["content"].encode()
        if kinds[token["id"]] != _UNKNOWN:
            kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The template, and those that have another name than "default", with a list of these names."""
    file = folder / CHAT_TEMPLATE_FILE
    said = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(said, dict):
        said = [{"name": name, "template": text} for name, text in said.items()]
    said = said if isinstance(said, list) else [{"name": "default", "template": said}]
    named = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
    found = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in named.items() if name and isinstance(text, str)}
    keys: dict[str, Any] = {"chat_template": text} if (text := found.pop("default", None)) else {}
    if found:
        keys |= {"chat_templates": list(found), **{f"chat_template.{name}": text for name, text in found.items()}}
    return keys
