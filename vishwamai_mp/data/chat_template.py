"""Chat templates, programs of strangers, run in a process of their own with bounded time and memory.

Jinja's sandbox keeps a template from the machine, not from filling it: `'x'.center(10 ** 10)`, loops within loops or a
text that doubles itself. Operating systems bound such things wherever they hide, so the process (`chat_rendering.py`)
has limits on its address space and on its processor time. It is started at the first conversation and serves all that
follow.
"""

import contextlib
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vishwamai_mp.config import UserError
from vishwamai_mp.config.errors import one_line
from vishwamai_mp.config.pointers import refuse_pointer_or_pipe
from vishwamai_mp.data.json_vocabulary import SETTINGS_FILE, read_settings
from vishwamai_mp.data.tokenizer import CHAT_TEMPLATE_FILE

_BATCH_CHARACTERS = 1 << 20  # of conversations that are handed over together
_HELD_BYTES = 1 << 26  # of their texts that are held at once


class ChatTemplate:
    """A template whose syntax is right.

    Args:
        text: Jinja, as transformers has it.
        name: of the file that it comes from, for messages.

    Attributes:
        marks_answers: whether it says by `{% generation %}` what the assistant has written.

    Raises:
        UserError: the text is no template.
    """

    def __init__(self, text: str, name: str) -> None:
        from vishwamai_mp.data.chat_rendering import environment, has_answer_marks

        self.text, self.name = text, name
        try:
            self.marks_answers = has_answer_marks(environment().parse(text))
        except Exception as error:  # also RecursionError, of expressions within each other
            raise UserError(f"the chat template of {name} is not valid ({one_line(error)}); mend it") from None

    @property
    def answers_by(self) -> str:
        """How the answers in a conversation's text are known."""
        return "generation marks" if self.marks_answers else "text up to each answer"

    @property
    def tells_time(self) -> bool:
        """Whether it may write a date."""
        return "strftime_now" in self.text

    @property
    def sha256(self) -> str:
        """Of its text in UTF-8."""
        return hashlib.sha256(self.text.encode(errors="surrogatepass")).hexdigest()

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation's text.

        Raises:
            UserError: the template does not take these messages, or needs more than it may have.
        """
        try:
            asked = json.dumps({"variables": {"messages": messages, **variables}})
        except (ValueError, RecursionError) as error:
            raise UserError(f"messages: they cannot be handed to a chat template ({one_line(error)})") from None
        ((written, problem),) = _process(os.getpid()).ask(self.text, [asked])
        if problem is not None:
            raise UserError(f"messages: the chat template of {self.name} does not take them ({problem})")
        return written

    def answers(self, conversations: Sequence[Mapping[str, Any]]) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
        """For each conversation its `text` and the `spans` (from and to a character) of its learnt answers, or else
        the problem.

        With `{% generation %}` in the template the spans are what stands there. Without, a span is what the text up
        to an answer, asked for by `add_generation_prompt`, grows by with it; the text up to each answer must be how
        the whole begins.

        Args:
            conversations: each with `messages`; `own`, other variables that its record gives; `variables` that are no
                one's own; `learnt`, numbers (from 0) of the messages to learn; `ignored`, keys that need not be read;
                `now`, the moment that a template is told, in ISO 8601.
        """
        batch: list[str] = []
        for conversation in conversations:
            line = json.dumps(conversation)
            if batch and sum(map(len, batch)) + len(line) > _BATCH_CHARACTERS:
                yield from _process(os.getpid()).ask(self.text, batch)
                batch = []
            batch.append(line)
        if batch:
            yield from _process(os.getpid()).ask(self.text, batch)


def read_template(path: Path) -> ChatTemplate:
    """The template in a file of its own. Raises `UserError` where it cannot be read or is none."""
    try:
        refuse_pointer_or_pipe(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); mend it or take it away") from None
    return ChatTemplate(text, path.name)


def template_beside(tokenizer: Path, settings: Mapping[str, Any] | None = None) -> ChatTemplate | None:
    """The template that lies beside a tokenizer's file: of its own file, or else of the settings, where it is a text
    or several with names. None: there is none.

    Args:
        settings: of `tokenizer_config.json`, where they have been read already.

    Raises:
        UserError: it cannot be read, or is none.
    """
    path = tokenizer.with_name(CHAT_TEMPLATE_FILE)
    if path.is_file():
        return read_template(path)
    if settings is None:
        settings = read_settings(tokenizer.with_name(SETTINGS_FILE))
    template = settings.get("chat_template")
    if isinstance(template, dict):
        template = template.get("default")
    elif isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return ChatTemplate(template, SETTINGS_FILE) if isinstance(template, str) else None


class _Process:
    """The process that renders; begun anew where a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None

    def ask(self, template: str, lines: Sequence[str]) -> Iterator[tuple[Any, str | None]]:
        """For each line what is written, or the problem."""
        answered = 0
        while answered < len(lines):
            answers = self._ask_some(template, lines[answered:])
            answered += len(answers)
            yield from answers

    def _ask_some(self, template: str, lines: Sequence[str]) -> list[tuple[Any, str | None]]:
        """Answers of the first lines: of all, unless one has ended the process, or they are very large together."""
        answers: list[tuple[Any, str | None]] = []
        size, whole = 0, False
        with self._lock:
            if self._running is None:
                self._running = _started()
            process = self._running
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write("".join(f"{line}\n" for line in (json.dumps(template), *lines, "")).encode())
                    process.stdin.flush()
                while len(answers) < len(lines) and size < _HELD_BYTES:
                    answer = process.stdout.readline()
                    if not answer.endswith(b"\n"):
                        break
                    written, problem = json.loads(answer)
                    answers.append((written, problem))
                    size += len(answer)
                whole = len(answers) == len(lines)
            finally:
                if not whole:
                    self._running = None
                    process.kill()
                    process.communicate()
        if not whole and size < _HELD_BYTES:
            answers.append((None, _ending(process.returncode)))
        return answers


def _ending(status: int) -> str:
    from vishwamai_mp.data.chat_rendering import SECONDS

    if status == -signal.SIGXCPU:
        return f"it takes more than {SECONDS} s of processor time"
    return f"its process ended with {status}"


@functools.cache
def _process(owner: int) -> _Process:
    """The one of the process `owner`: pipes cannot be shared with a fork."""
    return _Process()


def _started() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "vishwamai_mp.data.chat_rendering"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is for this process, whose end closes the pipe and so ends the other
    )
