"""What renders chat templates: Jinja as transformers sets it up, in a process with bounded time and memory.

`python -m vishwamai_mp.data.chat_rendering` is that process; `chat_template.py` starts and asks it. A batch comes in
as lines, JSON each: the template's text, one line for each conversation, an empty line. When the batch is read whole,
a line is answered for each conversation: JSON of what was written and of the problem, one of which is null. Reading
before answering keeps the two sides from waiting for each other with full pipes.
"""

import contextlib
import functools
import json
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vishwamai_mp.config.errors import one_line

MOST_CHARACTERS = 1 << 24  # of a conversation, as its template writes it
SECONDS = 2  # of processor time for a conversation
MEMORY_BYTES = 384 << 20  # of address space beyond what the process starts with
_NEWEST_TEMPLATES = 8
# Characters that Unicode keeps out of texts stand around answers while a template with {% generation %} is rendered.
_OPENS, _CLOSES = "\ufdd0", "\ufdd1"
# Keys within tool calls and parts of contents that tell them apart but say nothing to a model.
_LABELS = frozenset({"id", "type", "index"})


class _AnswerMarks(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: what the assistant has written."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_answer"), [], [], body).set_lineno(line)

    def _answer(self, caller: Any) -> str:
        return f"{_OPENS}{caller()}{_CLOSES}" if self.environment.marks_answers else caller()  # type: ignore[attr-defined]


def environment(marks_answers: bool = False) -> Any:
    """Jinja as transformers sets it up for chat templates.

    Args:
        marks_answers: what stands in `{% generation %}` is written with a mark at either side.
    """
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _AnswerMarks], finalize=_spoken
    )
    made.extend(marks_answers=marks_answers)
    made.filters["tojson"] = _to_json
    trim = made.filters["trim"]
    made.filters["trim"] = lambda value, *chars: trim(_spoken(value), *chars)
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def has_answer_marks(tree: nodes.Template) -> bool:
    """Whether a parsed template has `{% generation %}`."""
    return any(found.identifier == _AnswerMarks.identifier for found in tree.find_all(nodes.ExtensionAttribute))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    _read_whole(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _spoken(value: Any) -> Any:
    """What an expression writes. Jinja would write null as the word `None`, as if someone had said it."""
    if value is None:
        raise jinja2.TemplateError("it would write a value that is null as 'None', such as a content that is not there")
    return value


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Noting(dict):
    """A JSON object that notes which of its keys a template reads."""

    __slots__ = ("_seen",)

    def __init__(self, items: Iterable[tuple[str, Any]]) -> None:
        super().__init__(items)
        self._seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._seen.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:  # also keeps dict() and {**} from copying without __getitem__
        return super().__iter__()

    def items(self) -> Any:
        self._seen.update(self)
        return super().items()

    def values(self) -> Any:
        self._seen.update(self)
        return super().values()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __repr__(self) -> str:
        _read_whole(self)
        return super().__repr__()

    def unread(self, where: str, passed_over: frozenset[str]) -> Iterator[str]:
        """Where values are that no one has read, of those that say something."""
        for key, value in super().items():
            if value in (None, "", [], {}) or key in passed_over:
                continue
            if key in self._seen:
                yield from _unread(value, f"{where}.{key}", passed_over | _LABELS)
            else:
                yield f"{where}.{key}"


class _Parts(list):
    """A content of several parts, which a template must take apart."""

    def __repr__(self) -> str:
        raise jinja2.TemplateError(
            "a content is an array, and it would write that as Python code; give each message one text"
        )


def _noting(value: Any) -> Any:
    if isinstance(value, dict):
        noted = _Noting((key, _noting(inner)) for key, inner in value.items())
        if isinstance(value.get("content"), list):
            noted["content"] = _Parts(dict.get(noted, "content", ()))
        return noted
    return [_noting(inner) for inner in value] if isinstance(value, list) else value


def _unread(value: Any, where: str, passed_over: frozenset[str]) -> Iterator[str]:
    if isinstance(value, _Noting):
        yield from value.unread(where, passed_over)
    elif isinstance(value, list):
        for number, inner in enumerate(value, start=1):
            yield from _unread(inner, f"{where}[{number}]", passed_over)


def _read_whole(value: Any) -> None:
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _read_whole(inner)


@functools.lru_cache(maxsize=2 * _NEWEST_TEMPLATES)
def _compiled(text: str, marks_answers: bool) -> Any:
    return environment(marks_answers).from_string(text)


@functools.lru_cache(maxsize=_NEWEST_TEMPLATES)
def _own_variables(text: str) -> frozenset[str]:
    """Names that a template takes from those who render it."""
    made = environment()
    return frozenset(jinja2.meta.find_undeclared_variables(made.parse(text)) - set(made.globals))


@functools.lru_cache(maxsize=_NEWEST_TEMPLATES)
def _marks_answers(text: str) -> bool:
    return has_answer_marks(environment().parse(text))


class _Problem(Exception):  # noqa: N818 (what a user is told)
    """Why a conversation cannot be written."""


def _written(text: str, variables: Mapping[str, Any], marks_answers: bool = False) -> str:
    """Raises `_Problem` for more characters than there may be, and whatever the template raises."""
    parts, length = [], 0
    for part in _compiled(text, marks_answers).generate(variables):
        parts.append(part)
        length += len(part)
        if length > MOST_CHARACTERS:
            raise _Problem(f"it makes more than {MOST_CHARACTERS} characters of them")
    return "".join(parts)


def _with_answers(text: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation's `text`, and the `spans` of it, from and to a character, that its learnt answers are."""
    messages = [_noting(message) for message in asked["messages"]]
    own = {key: _noting(value) for key, value in asked["own"].items()}
    given = {**asked["variables"], "strftime_now": datetime.fromisoformat(asked["now"]).strftime}
    passed_over = frozenset(asked["ignored"])

    def write(count: int, prompt: bool = False, marked: bool = False) -> str:
        variables = {**own, **given, "messages": messages[:count], "add_generation_prompt": prompt}
        return _written(text, variables, marked)

    whole = write(len(messages))
    for key, value in own.items():
        taken = key in _own_variables(text) and key not in (*given, "messages", "add_generation_prompt")
        if value not in (None, "", [], {}) and not taken:
            raise _Problem(f"the record has {key!r}, which it does not use (--ignore-keys {key} leaves it out)")
    for number, message in enumerate(messages, start=1):
        for where in message.unread(f"message {number}", passed_over):
            _refuse_unread(where)
    for key, value in own.items():
        for where in _unread(value, key, passed_over | _LABELS):
            _refuse_unread(where)
    learnt = set(asked["learnt"])
    if _marks_answers(text):
        answers = [number for number, message in enumerate(messages) if dict.get(message, "role") == "assistant"]
        spans = _marked_spans(write(len(messages), marked=True), whole)
        if learnt != set(answers):
            if len(spans) != len(answers):
                raise _Problem(
                    f"its generation marks hold {len(spans)} texts for {len(answers)} answers: which of them are not"
                    " to be learnt cannot be told"
                )
            spans = [span for number, span in zip(answers, spans, strict=True) if number in learnt]
        if not any(start < end for start, end in spans):
            raise _Problem("nothing stands within its generation marks")
    else:
        spans = [_grown_span(number, write, whole, len(messages)) for number in sorted(learnt)]
    return {"text": whole, "spans": spans}


def _refuse_unread(where: str) -> None:
    key = where.rsplit(".", 1)[-1]
    raise _Problem(f"{where} is not read by it, and so would not be learnt from (--ignore-keys {key} leaves it out)")


def _marked_spans(marked: str, whole: str) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    length = 0
    parts = re.split(f"([{_OPENS}{_CLOSES}])", marked)
    for part in parts:
        if part == _OPENS:
            starts.append(length)
        elif part == _CLOSES and starts:
            start = starts.pop()
            if not starts:  # of marks within each other the outer one counts
                spans.append((start, length))
        else:
            length += len(part)
    if "".join(parts[::2]) != whole or starts:
        raise _Problem(
            "it changes a text that has generation marks in it (by trim or another filter): mark what it makes"
        )
    return spans


def _grown_span(number: int, write: Any, whole: str, count: int) -> tuple[int, int]:
    """What a conversation's text grows by with message `number`, an answer."""
    before = write(number, prompt=True)
    after = whole if number + 1 == count else write(number + 1)
    for shorter, longer, what in (
        (before, after, f"up to message {number + 1} it writes otherwise when that is answered"),
        (after, whole, f"up to message {number + 1} it writes otherwise when more follows"),
    ):
        if not longer.startswith(shorter):
            at = next((at for at, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
            raise _Problem(
                f"{what}, from character {at} on, so that the answer's own text is not known; put"
                " {% generation %} and {% endgeneration %} around answers in it"
            )
    if len(before) == len(after):
        raise _Problem(f"it writes nothing of message {number + 1}")
    return len(before), len(after)


def _answer(text: str, line: bytes) -> bytes:
    """JSON of what is written and of the problem, one of which is there."""
    try:
        asked = json.loads(line)
        answer = _with_answers(text, asked) if "learnt" in asked else _written(text, asked["variables"])
        return json.dumps((answer, None)).encode()
    except MemoryError:
        problem = f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"
    except Exception as error:  # of the template's own code
        problem = one_line(error)[:500]
    return json.dumps((None, problem)).encode()


def _batches() -> Iterator[Sequence[bytes]]:
    batch: list[bytes] = []
    for line in sys.stdin.buffer:
        if line != b"\n":
            batch.append(line)
        else:
            yield batch
            batch = []


def _serve() -> None:
    """Answers batches until there are no more."""
    environment()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    with contextlib.suppress(BrokenPipeError):
        for batch in _batches():
            text = json.loads(batch[0])
            for line in batch[1:]:
                _limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS)
                sys.stdout.buffer.write(_answer(text, line) + b"\n")
                sys.stdout.buffer.flush()


def _limit(what: int, amount: int) -> None:
    """Lowers the soft limit, which for the processor's time is raised again with each conversation."""
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


if __name__ == "__main__":
    _serve()
