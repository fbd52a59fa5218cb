"""Conversations to token ids by a chat template of Hugging Face's kind, with a loss on answers only.

A conversation is written by its template as a whole, as transformers' `apply_chat_template` does, and encoded as a
whole. Control tokens that are spelled in a text are those tokens, also in what a user has said. Where the template has
`{% generation %}`, what stands there is learnt. Where it has not, an answer is what the text grows by with it, and of
that white space behind the last control token, such as the line break behind `<|im_end|>`, is not learnt: generation
has stopped by then.
"""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from vishwamai_mp.data.chat import (
    LEARNT_MARKS,
    ROLES,
    ChatEncoder,
    Encoded,
    UnusableRecord,
    form_of,
    is_learnt,
)
from vishwamai_mp.data.chat_template import ChatTemplate
from vishwamai_mp.data.corpus import unusable
from vishwamai_mp.data.marks import BEGINS, LEARNT
from vishwamai_mp.data.spelled_tokens import SpelledTokens
from vishwamai_mp.data.tokenizer import Tokenizer


class TemplatedChat:
    """Records to token ids by a chat template.

    A prompt with its completion is taken as it stands, as `ChatEncoder` does.

    Args:
        tokenizer: of the model.
        template: what writes conversations.
        ignored: keys of records and messages that are taken as not there, and within messages need not be read.
        now: the moment that a template is told when it asks for one.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, ignored: Collection[str], now: datetime) -> None:
        self._template, self._ignored, self._now = template, ignored, now.isoformat()
        self._tokens = SpelledTokens(tokenizer)
        self._variables = self._tokens.variables()
        self._controls = tuple(tokenizer.control_tokens())
        self._as_it_stands = functools.cache(lambda: ChatEncoder(tokenizer, ignored=ignored))

    def encode_records(self, records: Sequence[Any]) -> Iterator[Encoded | UnusableRecord]:
        """Each record's tokens and marks, or why there are none."""
        asked: list[dict[str, Any]] = []
        others: dict[int, Encoded | UnusableRecord] = {}
        for number, record in enumerate(records):
            try:
                form, given = form_of(record, self._ignored)
                if form == ("prompt", "completion"):
                    others[number] = next(self._as_it_stands().encode_records([record]))
                else:
                    asked.append(self._asked(form, given))
            except UnusableRecord as reason:
                others[number] = reason
        answers = self._template.answers(asked)
        for number in range(len(records)):
            if number in others:
                yield others[number]
            else:
                yield self._marked(*next(answers))

    def _asked(self, form: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, Any]:
        """What the template is told of a record."""
        if form == ("question", "answer"):
            messages = [
                {"role": role, "content": given[key]} for role, key in zip(("user", "assistant"), form, strict=True)
            ]
            learnt = [False, True]
        else:
            messages, learnt = self._messages(given[form[0]], form[0])
        while learnt and not learnt[-1]:
            learnt.pop()  # after the last answer nothing is learnt
        if not learnt:
            raise UnusableRecord(f"{form[0]!r} has no answer to learn: no message of the assistant")
        own = {key: value for key, value in given.items() if key not in form}
        for key in ("tools", "documents"):
            if not isinstance(own.setdefault(key, None), list | None):
                raise UnusableRecord(f"{key!r} is no array")
        return {
            "messages": messages[: len(learnt)],
            "own": own,
            "variables": self._variables,
            "learnt": [number for number, counts in enumerate(learnt) if counts],
            "ignored": list(self._ignored),
            "now": self._now,
        }

    def _messages(self, messages: Any, key: str) -> tuple[list[dict[str, Any]], list[bool]]:
        """Messages for a template, and which of them are learnt."""
        if not isinstance(messages, list):
            raise UnusableRecord(f"{key!r} is no array")
        named: dict[Any, Any] = {"from": "role", "value": "content"} if key == "conversations" else {}
        found, learnt = [], []
        for number, message in enumerate(messages, start=1):
            where = f"{key!r}: message {number}"
            role_key = "from" if named else "role"
            if not isinstance(message, Mapping) or not isinstance(message.get(role_key), str):
                raise UnusableRecord(f"{where} is no object with a {role_key!r}")
            role = message[role_key]
            if twice := named.values() & message.keys():
                raise UnusableRecord(f"{where} has {min(twice)!r} beside 'from' and 'value'")
            if named and role not in ROLES:
                raise UnusableRecord(f"{where} has 'from'={role!r}; known: {', '.join(ROLES)}")
            role = ROLES[role] if named else role
            given = {name: value for name, value in message.items() if name not in self._ignored}
            learnt.append(is_learnt(given, role, where))
            kept: dict[Any, Any] = {  # in their order, which a template may write
                named.get(name, name): role if name == role_key else value
                for name, value in given.items()
                if name not in LEARNT_MARKS
            }
            found.append(kept)
        return found, learnt

    def _marked(self, written: Mapping[str, Any] | None, problem: str | None) -> Encoded | UnusableRecord:
        """Tokens and marks of what the template wrote."""
        if written is None:
            return UnusableRecord(f"the chat template of {self._template.name} does not take it: {problem}")
        text = written["text"]
        if reason := unusable(f"what the chat template of {self._template.name} makes of it", text):
            return UnusableRecord(reason)
        spans = [(start, end) for start, end in written["spans"]]
        if not self._template.marks_answers:
            spans = [(start, self._stops(text, start, end)) for start, end in spans]
        ids, held = self._tokens.encode_spans(text, spans)
        marks = [LEARNT if learnt else 0 for learnt in held]
        return ids, [marks[0] | BEGINS, *marks[1:]]

    def _stops(self, text: str, start: int, end: int) -> int:
        """Where an answer ends: behind its last control token, if no more than white space follows that."""
        spoken = text[start:end].rstrip()
        return start + len(spoken) if self._controls and spoken.endswith(self._controls) else end
