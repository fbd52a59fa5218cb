"""How a model is addressed: its tokenizer, whether prompts begin with BOS, what ends an answer, its chat template.

Beside a tokenizer's file may lie what Hugging Face keeps there: `tokenizer_config.json`, `chat_template.jinja` and
`generation_config.json`. They go along when a folder is imported and when a run is trained on.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vishwamai_mp.config import UserError
from vishwamai_mp.data.chat_template import ChatTemplate, template_beside
from vishwamai_mp.data.json_vocabulary import SETTINGS_FILE, read_settings
from vishwamai_mp.data.spelled_tokens import SpelledTokens
from vishwamai_mp.data.tokenizer import CHAT_TEMPLATE_FILE, GENERATION_FILE, Tokenizer

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
        self._spelled = SpelledTokens(tokenizer)
        self._settings = self._spelled.settings
        self.first = [self._bos()] if (self._adds_bos() if add_bos is None else add_bos) else []
        ends = [
            tokenizer.eod_id,
            self._spelled.named("eos_token"),
            *_end_ids(tokenizer.path.with_name(GENERATION_FILE)),
        ]
        known = range(tokenizer.vocab_size)
        self.end_tokens = tuple(sorted({token for token in ends if token in known}))
        self.template = template_beside(tokenizer.path, self._settings)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return self.first + self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def ends(self, stops: Sequence[str]) -> tuple[int, ...]:
        """`end_tokens`, and control tokens that are spelled as one of these stop texts: no text ever has them."""
        control = self.tokenizer.control_tokens()
        return tuple(sorted({*self.end_tokens, *(control[stop] for stop in stops if stop in control)}))

    def content_of(self, token: int) -> bytes:
        """What one token stands for in UTF-8, which may be a part of a character."""
        return self.tokenizer.content_of(token)

    def spell(self, token: int) -> str:
        """One token as a text of its own; a byte of a longer character as OpenAI writes it, `bytes:\\xe2`."""
        content = self.content_of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation that the model is to go on, as transformers' `apply_chat_template` makes them.

        Raises:
            UserError: there is no template, or it does not take these messages.
        """
        return self._spelled.encode(self.render(messages))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation's text by the template. Raises as `chat` does."""
        if self.template is None:
            raise UserError(
                f"the model has no chat template ({CHAT_TEMPLATE_FILE} or chat_template in {SETTINGS_FILE}, beside"
                f" {self.tokenizer.path.name}); put one there, or send a prompt"
            )
        text = self._written(self.template, messages)
        self._check_nothing_is_lost(self.template, messages)
        return text

    def _written(self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> str:
        variables = self._spelled.variables()
        return template.render(messages, tools=None, documents=None, add_generation_prompt=True, **variables)

    def _check_nothing_is_lost(self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> None:
        """Many templates pass over roles that they do not know (`developer`) without a word. Here each message says a
        word of its own instead of its text, which may be trimmed, or written as JSON: every word has to be written.

        Not those of answers, of which templates leave out what was thought before them.
        """
        words = {
            number: f"message{number}text"
            for number, message in enumerate(messages)
            if message.get("role") != "assistant" and isinstance(message.get("content"), str)
        }
        said = [
            {**message, "content": words[number]} if number in words else message
            for number, message in enumerate(messages)
        ]
        written = self._written(template, said)
        for number, word in words.items():
            if word not in written:
                raise UserError(
                    f"messages.{number}: the chat template of {template.name} leaves this message of role"
                    f" {messages[number].get('role')} out; give it another role"
                )

    def _adds_bos(self) -> bool:
        said, does = self._settings.get("add_bos_token"), self.tokenizer.vocabulary.puts_bos_first
        if does is not None:  # what transformers goes by, whatever the settings say
            if said is not None and bool(said) != does:
                self.notes.append(
                    f"{SETTINGS_FILE} has add_bos_token={json.dumps(said)}, but {self.tokenizer.path.name} puts"
                    f" {'BOS' if does else 'nothing'} before a text: so do prompts, without --bos or --no-bos"
                )
            return does
        if said is None:
            return str(self._settings.get("tokenizer_class", "")).removesuffix("Fast") in _BEGIN_WITH_BOS
        return bool(said)

    def _bos(self) -> int:
        named = self._spelled.named("bos_token")
        return self.tokenizer.require_bos() if named is None else named


def _end_ids(path: Path) -> list[Any]:
    """`eos_token_id` of a generation configuration: a number, or several."""
    ids = read_settings(path).get("eos_token_id")
    return ids if isinstance(ids, list) else [ids]
