"""Conversations: how they are read from JSON, and how they become token ids with a loss on answers only.

The template. A turn is its role's heading and its text; an answer ends with the tokenizer's end-of-document token,
where generation stops:

    ### System:⏎text⏎⏎
    ### User:⏎text⏎⏎
    ### Assistant:⏎text<eod>

Where the vocabulary has `<|system|>`, `<|user|>` and `<|assistant|>`, these are the headings, and nothing else stands
between turns. All text up to an answer is encoded in one piece, as a prompt is at inference; an answer is encoded as it
goes on after that, so that no tokenizer puts a space before it. A prompt with a completion is taken as it stands,
without headings.

Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vishwamai_mp.data.corpus import unusable
from vishwamai_mp.data.marks import BEGINS, LEARNT
from vishwamai_mp.data.tokenizer import Tokenizer

_HEADINGS = {"system": "### System:\n", "user": "### User:\n", "assistant": "### Assistant:\n"}
_AFTER_TEXT = "\n\n"
_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in _HEADINGS}}
_KEYS = "'messages', 'conversations', 'question' and 'answer', or 'prompt' and 'completion'"


@dataclass(frozen=True)
class Turn:
    """One message. `role` is system, user or assistant; None: text as it stands, `learnt` or not."""

    role: str | None
    text: str
    learnt: bool = False


class UnusableRecord(Exception):  # noqa: N818 (a finding about the data: its reader decides what it means)
    """Why a JSON value is no conversation."""


def conversation(record: Any) -> list[Turn]:
    """The turns of a JSON value, up to the last answer.

    Args:
        record: an object with `messages` of `role` and `content`, `conversations` of `from` and `value`, a `question`
            and its `answer`, or a `prompt` and its `completion`.

    Raises:
        UnusableRecord: it is nothing of these, a role is unknown, a text is none, or there is no answer.
    """
    if not isinstance(record, Mapping):
        raise UnusableRecord(f"not a JSON object with {_KEYS}")
    if "messages" in record:
        return _turns(record["messages"], "messages", "role", "content")
    if "conversations" in record:
        return _turns(record["conversations"], "conversations", "from", "value")
    if "question" in record and "answer" in record:
        question, answer = _texts(record, "question", "answer")
        return [Turn("user", question), Turn("assistant", answer, learnt=True)]
    if "prompt" in record and "completion" in record:
        prompt, completion = _texts(record, "prompt", "completion")
        return [Turn(None, prompt), Turn(None, completion, learnt=True)]
    raise UnusableRecord(f"no {_KEYS} (keys: {', '.join(map(repr, list(record)[:8]))})")


def _turns(messages: Any, key: str, role_key: str, text_key: str) -> list[Turn]:
    if not isinstance(messages, list):
        raise UnusableRecord(f"{key!r} is no array")
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not message.keys() >= {role_key, text_key}:
            raise UnusableRecord(f"{key!r}: message {number} is no object with {role_key!r} and {text_key!r}")
        role = _ROLES.get(message[role_key]) if isinstance(message[role_key], str) else None
        if role is None:
            known = ", ".join(_ROLES)
            raise UnusableRecord(f"{key!r}: message {number} has {role_key!r}={message[role_key]!r}; known: {known}")
        if reason := unusable(text_key, message[text_key]):
            raise UnusableRecord(f"{key!r}: message {number}: {reason}")
        turns.append(Turn(role, message[text_key], learnt=role == "assistant"))
    while turns and not turns[-1].learnt:
        turns.pop()  # after the last answer nothing is learnt
    if not turns:
        raise UnusableRecord(f"{key!r} has no answer: no message of the assistant")
    return turns


def _texts(record: Mapping[str, Any], *keys: str) -> list[str]:
    for key in keys:
        if reason := unusable(key, record[key]):
            raise UnusableRecord(reason)
    return [record[key] for key in keys]


class ChatEncoder:
    """Turns to token ids by the template above.

    Args:
        tokenizer: with an end-of-document token.
        begin: a conversation begins with the tokenizer's beginning-of-sequence token, as Llama's do.

    Raises:
        UserError: the tokenizer lacks one of these tokens.
    """

    def __init__(self, tokenizer: Tokenizer, begin: bool = False) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.require_eod()
        self._first = [tokenizer.require_bos()] if begin else []
        pieces = {role: tokenizer.find(f"<|{role}|>") for role in _HEADINGS}
        self._pieces = {role: piece for role, piece in pieces.items() if piece is not None}
        if len(self._pieces) < len(_HEADINGS):
            self._pieces = {}
        self._line_break = tokenizer.encode("\n")

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and as many marks: sums of `LEARNT` and `BEGINS`."""
        ids, learnt = list(self._first), [0] * len(self._first)

        def add(more: list[int], mark: int) -> None:
            ids.extend(more)
            learnt.extend([mark] * len(more))

        pending = ""  # text that is encoded when an answer, or a heading that is a piece, ends it
        for turn in turns:
            if turn.role in self._pieces:
                add([self._pieces[turn.role]], 0)
            elif turn.role:
                pending += _HEADINGS[turn.role]
            if turn.learnt:
                add(self._tokenizer.encode(pending), 0)
                pending = ""
                add([*self._going_on(turn.text), self._end], LEARNT)
            elif turn.role in self._pieces:
                add(self._going_on(turn.text), 0)
            else:
                pending += turn.text + (_AFTER_TEXT if turn.role else "")
        return ids, [learnt[0] | BEGINS, *learnt[1:]]

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids that an answer to `turns` goes on after, heading of the answer included."""
        return self.encode([*turns, Turn("assistant", "", learnt=True)])[0][:-1]

    def _going_on(self, text: str) -> list[int]:
        """As the text is encoded after other text: many vocabularies begin a text with a space of their own."""
        ids, skip = self._tokenizer.encode("\n" + text), len(self._line_break)
        return ids[skip:] if ids[:skip] == self._line_break else self._tokenizer.encode(text)
