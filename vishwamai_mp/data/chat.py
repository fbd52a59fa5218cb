"""Conversations: how they are read from JSON, and how they become token ids with a loss on answers only.

The template. A turn is its role's heading and its text; an answer ends with the tokenizer's end-of-document token,
where generation stops, also an answer without loss:

    ### System:⏎text⏎⏎
    ### User:⏎text⏎⏎
    ### Assistant:⏎text<eod>

Where the vocabulary has `<|system|>`, `<|user|>` and `<|assistant|>`, these are the headings, and nothing else stands
between turns. All text up to an answer is encoded in one piece, as a prompt is at inference; an answer is encoded as it
goes on after that, so that no tokenizer puts a space before it. A prompt with a completion is taken as it stands,
without headings.

Needs no torch.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vishwamai_mp.data.corpus import unusable
from vishwamai_mp.data.marks import BEGINS, LEARNT
from vishwamai_mp.data.tokenizer import Tokenizer

_HEADINGS = {"system": "### System:\n", "user": "### User:\n", "assistant": "### Assistant:\n"}
_AFTER_TEXT = "\n\n"
ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in _HEADINGS}}
_FORMS = (("messages",), ("conversations",), ("question", "answer"), ("prompt", "completion"))
_KEYS = "'messages', 'conversations', 'question' and 'answer', or 'prompt' and 'completion'"
LEARNT_MARKS = ("weight", "loss", "train", "trainable")  # of a message: whether it is learnt, true or 1, false or 0

Encoded = tuple[list[int], list[int]]  # token ids, and as many marks: sums of `LEARNT` and `BEGINS`


@dataclass(frozen=True)
class Turn:
    """One message. `role` is system, user or assistant; None: text as it stands."""

    role: str | None
    text: str
    learnt: bool = False


class UnusableRecord(Exception):  # noqa: N818 (a finding about the data: its reader decides what it means)
    """Why a JSON value is no conversation."""


def form_of(record: Any, ignored: Collection[str] = ()) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Which of the known keys a record has, and the record without the `ignored` ones.

    Raises:
        UnusableRecord: it has none of them.
    """
    if not isinstance(record, Mapping):
        raise UnusableRecord(f"not a JSON object with {_KEYS}")
    given = {key: value for key, value in record.items() if key not in ignored}
    form = next((form for form in _FORMS if given.keys() >= set(form)), None)
    if form is None:
        raise UnusableRecord(f"no {_KEYS} (keys: {', '.join(map(repr, list(given)[:8]))})")
    return form, given


def conversation(record: Any, ignored: Collection[str] = ()) -> list[Turn]:
    """The turns of a JSON value, up to the last answer that is learnt.

    Nothing in a record or message is passed over: a key that is neither used nor `ignored` makes it unusable, unless
    its value is null or an empty string, array or object, which say nothing.

    Args:
        record: an object with `messages` of `role` and `content`, `conversations` of `from` and `value`, a `question`
            and its `answer`, or a `prompt` and its `completion`. A message of the assistant may say by `weight`,
            `loss`, `train` or `trainable` (true or 1, false or 0) whether it is learnt.
        ignored: keys of records and messages that are taken as not there.

    Raises:
        UnusableRecord: it is nothing of these, a role or key is unknown, a text is none, or no answer is learnt.
    """
    form, given = form_of(record, ignored)
    _refuse_others(given, form, "the record")
    if form == ("messages",):
        return _turns(given["messages"], "messages", "role", "content", ignored)
    if form == ("conversations",):
        return _turns(given["conversations"], "conversations", "from", "value", ignored)
    roles = ("user", "assistant") if form == ("question", "answer") else (None, None)
    asked, answered = _texts(given, *form)
    return [Turn(roles[0], asked), Turn(roles[1], answered, learnt=True)]


def _refuse_others(given: Mapping[str, Any], used: Collection[str], where: str) -> None:
    for key, value in given.items():
        if key not in used and value not in (None, "", [], {}):
            raise UnusableRecord(f"{where} has {key!r}, which cannot be learnt (--ignore-keys {key} leaves it out)")


def _turns(messages: Any, key: str, role_key: str, text_key: str, ignored: Collection[str]) -> list[Turn]:
    if not isinstance(messages, list):
        raise UnusableRecord(f"{key!r} is no array")
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f"{key!r}: message {number}"
        if not isinstance(message, Mapping) or not message.keys() >= {role_key, text_key}:
            raise UnusableRecord(f"{where} is no object with {role_key!r} and {text_key!r}")
        role = ROLES.get(message[role_key]) if isinstance(message[role_key], str) else None
        if role is None:
            known = ", ".join(ROLES)
            raise UnusableRecord(f"{where} has {role_key!r}={message[role_key]!r}; known: {known}")
        given = {key: value for key, value in message.items() if key not in ignored}
        _refuse_others(given, (role_key, text_key, *LEARNT_MARKS), where)
        if reason := unusable(text_key, message[text_key]):
            raise UnusableRecord(f"{where}: {reason}")
        turns.append(Turn(role, message[text_key], is_learnt(given, role, where)))
    while turns and not turns[-1].learnt:
        turns.pop()  # after the last answer nothing is learnt
    if not turns:
        raise UnusableRecord(f"{key!r} has no answer to learn: no message of the assistant")
    return turns


def is_learnt(message: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a message is learnt: an answer is, unless it is marked otherwise."""
    marks = {key: message[key] for key in LEARNT_MARKS if message.get(key) is not None}
    for key, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UnusableRecord(f"{where} has {key!r}={value!r}; use true or 1, false or 0")
        if value and role != "assistant":
            raise UnusableRecord(f"{where} has {key!r}={value!r}, but only answers of the assistant are learnt")
    if len(set(map(bool, marks.values()))) > 1:
        raise UnusableRecord(f"{where} has marks that disagree: {', '.join(f'{k}={v!r}' for k, v in marks.items())}")
    return role == "assistant" and all(marks.values())


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
        ignored: keys of records and messages that are taken as not there.

    Raises:
        UserError: the tokenizer lacks one of these tokens.
    """

    def __init__(self, tokenizer: Tokenizer, begin: bool = False, ignored: Collection[str] = ()) -> None:
        self._tokenizer, self._ignored = tokenizer, ignored
        self._end = tokenizer.require_eod()
        self._first = [tokenizer.require_bos()] if begin else []
        pieces = {role: tokenizer.find(f"<|{role}|>") for role in _HEADINGS}
        self._pieces = {role: piece for role, piece in pieces.items() if piece is not None}
        if len(self._pieces) < len(_HEADINGS):
            self._pieces = {}
        self._line_break = tokenizer.encode("\n")

    def encode_records(self, records: Sequence[Any]) -> Iterator[Encoded | UnusableRecord]:
        """The conversation of each record, or why there is none."""
        for record in records:
            try:
                yield self.encode(conversation(record, self._ignored))
            except UnusableRecord as reason:
                yield reason

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """A conversation's tokens and marks."""
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
            if turn.learnt or turn.role == "assistant":
                add(self._tokenizer.encode(pending), 0)
                pending = ""
                add([*self._going_on(turn.text), self._end], LEARNT if turn.learnt else 0)
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
