"""How a model is addressed: its tokenizer, whether prompts begin with BOS, what ends an answer, its chat template.

Beside a tokenizer's file may lie what Hugging Face keeps there: `tokenizer_config.json`, `chat_template.jinja` and
`generation_config.json`. They go along when a folder is imported and when a run is trained on.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vishwamai_mp.config import UserError
from vishwamai_mp.config.errors import one_line
from vishwamai_mp.config.pointers import refuse_pointer
from vishwamai_mp.data.json_vocabulary import SETTINGS_FILE, read_settings
from vishwamai_mp.data.tokenizer import CHAT_TEMPLATE_FILE, GENERATION_FILE, Tokenizer
from vishwamai_mp.opening.chat_template import ChatTemplate

# Tokenizers of transformers that put BOS first unless they are told not to.
_BEGIN_WITH_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


class PromptTokenizer:
    """A tokenizer with the ways of its model.

    Args:
        path: of the tokenizer, as `Tokenizer` has it.
        vocab_size: of the model, which may have rows beyond the tokenizer's tokens; they are never generated.
        add_bos: whether a prompt begins with BOS; None: as `tokenizer_config.json` says, or else not.

    Attributes:
        tokenizer: plain.
        first: ids that a prompt begins with: BOS or none.
        end_tokens: ids that end an answer.
        template: the chat template; None: there is none.
        notes: what the user should know.

    Raises:
        UserError: no tokenizer, one of more tokens than the model's, or files beside it that cannot be read.
    """

    def __init__(self, path: str | Path, vocab_size: int, add_bos: bool | None = None) -> None:
        self.tokenizer = tokenizer = Tokenizer(path)
        self.notes: list[str] = []
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, the model {vocab_size};"
                " give the one that the model was trained with (data.tokenizer)"
            )
        if tokenizer.vocab_size < vocab_size:
            self.notes.append(
                f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, the model {vocab_size}: those"
                " beyond are never generated"
            )
        self._settings = read_settings(tokenizer.path.with_name(SETTINGS_FILE))
        self.first = [self._bos()] if (self._adds_bos() if add_bos is None else add_bos) else []
        ends = [tokenizer.eod_id, self._named("eos_token"), *_end_ids(tokenizer.path.with_name(GENERATION_FILE))]
        known = range(tokenizer.vocab_size)
        self.end_tokens = tuple(sorted({token for token in ends if token in known}))
        self.template = _read_template(tokenizer.path.with_name(CHAT_TEMPLATE_FILE), self._settings)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return self.first + self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def spell(self, token: int) -> str:
        """One token as a text of its own; a byte of a longer character as OpenAI writes it, `bytes:\\xe2`."""
        content = self.tokenizer.content_of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation that the model is to go on, as transformers' `apply_chat_template` makes them.

        Raises:
            UserError: there is no template, or it does not take these messages.
        """
        return self._encode_marked(self.render(messages))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation's text by the template. Raises as `chat` does."""
        if self.template is None:
            raise UserError(
                f"the model has no chat template ({CHAT_TEMPLATE_FILE} or chat_template in {SETTINGS_FILE}, beside"
                f" {self.tokenizer.path.name}); put one there, or send a prompt"
            )

        spelled = {name: self._spelling(name) or "" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return self.template.render(messages, tools=None, documents=None, add_generation_prompt=True, **spelled)

    def _encode_marked(self, text: str) -> list[int]:
        """As `encode`, without BOS; but control tokens that are spelled out are themselves."""
        for token in self._lacking():
            if token in text:
                raise UserError(f"the chat template writes {token}, which the tokenizer {self.tokenizer.path} lacks")
        if self.tokenizer.proto is None:  # a tokenizer.json finds them itself
            return self.tokenizer.encode(text)
        marks = self.tokenizer.control_tokens()
        pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
        ids: list[int] = []
        for number, part in enumerate(re.split(f"({pattern})", text) if marks else [text]):
            if part in marks:
                ids.append(marks[part])
            elif part:
                begins = number == 0 or bool(self._settings.get("legacy"))
                ids += self.tokenizer.encode(part) if begins else self._going_on(part)
        return ids

    def _going_on(self, text: str) -> list[int]:
        """As the text is encoded behind other text: some vocabularies begin a text with a space of their own."""
        line_break = self.tokenizer.encode("\n")
        ids = self.tokenizer.encode("\n" + text)
        return ids[len(line_break) :] if ids[: len(line_break)] == line_break else self.tokenizer.encode(text)

    def _lacking(self) -> list[str]:
        """Tokens that were added to the model's vocabulary behind the tokenizer's."""
        added = self._settings.get("added_tokens_decoder")
        entries = added.items() if isinstance(added, dict) else ()
        return [
            str(entry["content"])
            for number, entry in entries
            if str(number).isdigit() and int(number) >= self.tokenizer.vocab_size and isinstance(entry, dict)
        ]

    def _adds_bos(self) -> bool:
        said = self._settings.get("add_bos_token")
        if said is None and self.tokenizer.vocabulary.puts_bos_first is not None:
            return self.tokenizer.vocabulary.puts_bos_first
        if said is None:
            return str(self._settings.get("tokenizer_class", "")).removesuffix("Fast") in _BEGIN_WITH_BOS
        return bool(said)

    def _bos(self) -> int:
        named = self._named("bos_token")
        return self.tokenizer.require_bos() if named is None else named

    def _named(self, name: str) -> int | None:
        """The id of a token that the settings name, such as `eos_token`."""
        said = self._said(name)
        return None if said is None else self.tokenizer.find(said)

    def _said(self, name: str) -> str | None:
        said = self._settings.get(name)
        if isinstance(said, dict):
            said = said.get("content")
        return said if isinstance(said, str) else None

    def _spelling(self, name: str) -> str | None:
        ids = {
            "bos_token": self.tokenizer.bos_id,
            "eos_token": self.tokenizer.eod_id,
            "pad_token": self.tokenizer.pad_id,
            "unk_token": self.tokenizer.unk_id,
        }
        return self._said(name) or (self.tokenizer.id_to_token(ids[name]) if ids[name] >= 0 else None)


def _end_ids(path: Path) -> list[Any]:
    """`eos_token_id` of a generation configuration: a number, or several."""
    ids = read_settings(path).get("eos_token_id")
    return ids if isinstance(ids, list) else [ids]


def _read_template(path: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of its own file, or else of the settings: a text, or several with names."""
    if path.is_file():
        refuse_pointer(path)
        try:
            template: Any = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}); mend it or take it away") from None
    else:
        template = settings.get("chat_template")
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[-1].get("template") if named else None
    if not isinstance(template, str):
        return None
    return ChatTemplate(template, path.name if path.is_file() else SETTINGS_FILE)
