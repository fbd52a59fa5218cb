"""The vocabulary in a `tokenizer.json` of Hugging Face's `tokenizers`, with the settings that lie beside it."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vishwamai_mp.config.errors import UserError, one_line
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe
from vishwamai_mp.config.wording import lacks
from vishwamai_mp.data.cutting import DIGITS, SPACE_CUTTING

SETTINGS_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"  # spellings with their ids, beyond those of the vocabulary proper
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
# What these tokens are usually spelled, for a file without settings beside it. The first that it has is meant.
_USUAL = {
    "bos_token": (
        "<|begin_of_text|>",
        "<s>",
        "<bos>",
        "[BOS]",
        "<|startoftext|>",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    ),
    "eos_token": (
        "<|end_of_text|>",
        "<|endoftext|>",
        "</s>",
        "<eos>",
        "[EOS]",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "unk_token": ("<unk>", "[UNK]"),
}
_SPACE = "\u2581"  # a space in vocabularies that come from SentencePiece


class JsonVocabulary:
    """See `tokenizer.Vocabulary`. Added tokens are found wherever they stand in a text; special ones decode to nothing.

    Which tokens begin and end a text is said by `tokenizer_config.json` or `special_tokens_map.json` beside the file,
    or else guessed from their usual spellings.

    Args:
        path: of the file; what lies beside it is read as well.
        content: the file's.

    Attributes:
        described: the file's JSON, with the tokens that are added by what lies beside it.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(lacks(f"tokenizer {path}", "tokenizers")) from None
        self.proto: bytes | None = None
        self._path = path
        with self._its_faults():
            described = parse_json(content)
        if "model" not in described and isinstance(described.get("config"), dict):
            raise UserError(
                f"tokenizer {path} is a tekken.json: make a tokenizer.json of it, tools/convert_tokenizer.py"
            )
        with self._its_faults():
            self._tokenizer = Tokenizer.from_buffer(content)
            if add_tokens_beside(self._tokenizer, path):
                described["added_tokens"] = parse_json(self._tokenizer.to_str())["added_tokens"]
        self.described: dict[str, Any] = described
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._settings = settings_beside(path)
        self._tokenizer.encode_special_tokens = self._settings.get("split_special_tokens") is True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"tokenizer {path} has no tokens: copy it again")
        self.size: int = max(vocabulary.values()) + 1
        self._spellings = {i: token for token, i in vocabulary.items()}
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._bytes = byte_alphabet() if '"ByteLevel"' in json.dumps(described.get("decoder")) else None
        self.cuts_at_spaces = _cuts_at_spaces(described)
        self.unk_id = self._named("unk_token", described.get("model", {}).get("unk_token"))
        self.bos_id = self._named("bos_token")
        self.eod_id = self._named("eos_token")
        self.pad_id = self._named("pad_token")
        with self._its_faults():
            first = self._tokenizer.encode("", add_special_tokens=True).ids[:1]
        self.puts_bos_first: bool | None = bool(first) and first[0] != self.eod_id and self.bos_id in (-1, first[0])
        if self.puts_bos_first:
            self.bos_id = first[0]

    def encode(self, text: str) -> list[int]:
        with self._its_faults():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with self._its_faults():
            return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_placed(self, text: str) -> list[tuple[int, int, int]]:
        with self._its_faults():
            found = self._tokenizer.encode(text, add_special_tokens=False)
        return [(token, first, last) for token, (first, last) in zip(found.ids, found.offsets, strict=True)]

    def decode(self, ids: list[int]) -> str:
        with self._its_faults():
            return self._tokenizer.decode(ids, skip_special_tokens=True)

    def spelling(self, token_id: int) -> str:
        return self._spellings.get(token_id, "")

    def find(self, token: str) -> int | None:
        try:
            return self._tokenizer.token_to_id(token)
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and no vocabulary holds
            return None

    def content_of(self, token_id: int) -> bytes:
        spelled = self.spelling(token_id)
        if token_id in self._added:
            return spelled.encode()
        if self._bytes is not None:
            return b"".join(self._bytes.get(c) or c.encode() for c in spelled)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", spelled):
            return bytes([int(spelled[3:5], 16)])
        return spelled.replace(_SPACE, " ").encode()

    def control_tokens(self) -> dict[str, int]:
        return dict(self._special)

    def has_byte_fallback(self) -> bool:
        return self._bytes is not None or all(f"<0x{byte:02X}>" in self._spellings.values() for byte in range(256))

    @contextmanager
    def _its_faults(self) -> Iterator[None]:
        """Makes what the package raises over a damaged file a `UserError`; a panic of its Rust code is no Exception."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
            raise
        except BaseException as error:
            reason = one_line(error)[:200]
            raise UserError(
                f"tokenizer {self._path} cannot be read as a tokenizer.json of Hugging Face ({reason}): copy it again"
            ) from None

    def _named(self, name: str, otherwise: Any = None) -> int:
        """The id of the token that the settings name, or that is usually meant; -1: there is none."""
        said = self._settings.get(name, otherwise)
        if isinstance(said, dict):
            said = said.get("content")
        if isinstance(said, str):
            found = self.find(said)
            return -1 if found is None else found
        if name in self._settings:  # null: the model has none
            return -1
        return next((self._special[token] for token in _USUAL[name] if token in self._special), -1)


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object that may lie beside a tokenizer; empty without one. Raises `UserError` for anything else."""
    if not path.is_file():
        return {}
    refuse_pointer_or_pipe(path)
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); mend it or take it away") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no JSON object; mend it or take it away")
    return settings


def settings_beside(path: Path) -> dict[str, Any]:
    """`tokenizer_config.json` and `special_tokens_map.json` beside a tokenizer's file. Of a name that both have the
    latter counts, unless the former lists the added tokens: as transformers has it."""
    settings, special = (read_settings(path.with_name(name)) for name in (SETTINGS_FILE, _SPECIAL_TOKENS_FILE))
    return {**special, **settings} if "added_tokens_decoder" in settings else {**settings, **special}


def tokens_beside(path: Path) -> list[dict[str, Any]]:
    """Tokens that the files beside a tokenizer's add to it, in transformers' order, with the flags of `AddedToken`.

    Those that the vocabulary has are among them: what is said here of them counts.
    """
    settings = settings_beside(path)
    named = {name: value for name, value in settings.items() if name.endswith("_token") and _token(value)}
    further = [settings.get(name) or [] for name in ("extra_special_tokens", "additional_special_tokens")]
    others = [one for some in further for one in (some.values() if isinstance(some, dict) else _list(some))]
    special = [{**token, "special": True} for token in map(_token, [*named.values(), *others]) if token]
    found: dict[str, dict[str, Any]] = {}
    if "added_tokens_decoder" in settings:
        listed = _object(settings["added_tokens_decoder"])
        for i in sorted((i for i in listed if i.isdecimal()), key=int):
            if token := _token(listed[i]):
                found[token["content"]] = {"special": False, **token}
    else:
        names = {token["content"] for token in special}
        numbers = read_settings(path.with_name(ADDED_TOKENS_FILE))
        for content, _ in sorted(numbers.items(), key=lambda pair: pair[1] if type(pair[1]) is int else 0):
            if token := _token(content):
                found[content] = {**token, "special": content in names}
    for token in special:
        found.setdefault(token["content"], token)
    return list(found.values())


def add_tokens_beside(library: Any, path: Path) -> bool:
    """Add `tokens_beside` to a tokenizer of Hugging Face's library. Returns whether there were any.

    What is only named, not listed, has no effect on a token that the tokenizer has as an added one. A new token for
    padding is left out where it would be the last: no text has it, and many models have no row for it.
    """
    from tokenizers import AddedToken

    settings = settings_beside(path)
    listed = _object(settings.get("added_tokens_decoder"))
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    overriding = {_object(one).get("content") for one in listed.values()}
    tokens = [token for token in tokens_beside(path) if token["content"] in overriding or token["content"] not in known]
    padding = _token(settings.get("pad_token"))
    is_last = tokens and padding and tokens[-1]["content"] == padding["content"]
    if is_last and library.token_to_id(tokens[-1]["content"]) is None:
        tokens.pop()
    library.add_tokens([AddedToken(**{"normalized": not token["special"], **token}) for token in tokens])
    return bool(tokens)


def _token(value: Any) -> dict[str, Any] | None:
    """A token as these files have it, a text or an object; None where it is neither."""
    if isinstance(value, dict):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        content = value.get("content")
        kept = {flag: value[flag] for flag in flags if isinstance(value.get(flag), bool)}
    else:
        content, kept = value, {}
    if not isinstance(content, str) or not content or any("\ud800" <= c <= "\udfff" for c in content):
        return None  # half a surrogate pair is no text, so no text has it
    return {"content": content, **kept}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _cuts_at_spaces(described: Mapping[str, Any]) -> bool:
    """Whether texts are cut before every space that follows something else than whitespace, whatever stands around it.

    So it is where byte pairs are joined within cuts by rules in `cutting.SPACE_CUTTING`, and nothing else looks at
    texts: no normalizer, and no added token that has a space or takes one in.
    """
    outer = described.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    cuts = False
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}:
                if rule not in SPACE_CUTTING and rule not in DIGITS:
                    return False
                cuts |= rule in SPACE_CUTTING
            case {"type": "Digits"}:
                pass
            case {"type": "ByteLevel", "add_prefix_space": False}:
                cuts |= step.get("use_regex", True)  # the rule "gpt2"
            case _:
                return False
    model, added = described.get("model", {}), described.get("added_tokens") or []
    return (
        cuts
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and (described.get("normalizer") or {}).get("normalizers", described.get("normalizer")) in (None, [])
        and not any(" " in token["content"] for token in added)
        and not any(token.get(name) for token in added for name in ("lstrip", "rstrip", "single_word"))
    )


def byte_alphabet() -> dict[str, bytes]:
    """The bytes that byte-level vocabularies (GPT-2's and all since) write as characters.

    Printable characters of Latin-1 stand for their own byte; the other bytes, in order, for U+0100 onwards.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    pairs = [(chr(byte), byte) for byte in own] + [(chr(256 + n), byte) for n, byte in enumerate(others)]
    return {character: bytes([byte]) for character, byte in pairs}
