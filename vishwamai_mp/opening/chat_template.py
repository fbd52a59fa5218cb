"""Chat templates, programs of strangers, run in a process of their own with bounded time and memory.

Jinja's sandbox keeps a template from the machine, not from filling it: `'x'.center(10 ** 10)`, loops within loops or a
text that doubles itself. Operating systems bound such things wherever they hide, so the process has limits on its
address space and on its processor time. It is started at the first conversation and serves all that follow.
"""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from vishwamai_mp.config import UserError
from vishwamai_mp.config.errors import one_line

MOST_CHARACTERS = 1 << 24  # of a conversation, as its template writes it
SECONDS = 2  # of processor time for a conversation
_MEMORY_BYTES = 384 << 20  # of address space beyond what the process starts with
_NEWEST_TEMPLATES = 8


class ChatTemplate:
    """A template whose syntax is right.

    Args:
        text: Jinja, as transformers has it.
        name: of the file that it comes from, for messages.

    Raises:
        UserError: the text is no template.
    """

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        try:
            _environment().parse(text)
        except Exception as error:  # also RecursionError, of expressions within each other
            raise UserError(f"the chat template of {name} is not valid ({one_line(error)}); mend it") from None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation's text.

        Raises:
            UserError: the template does not take these messages, or needs more than it may have.
        """
        try:
            asked = json.dumps([self.text, {"messages": messages, **variables}])
        except (ValueError, RecursionError) as error:
            raise UserError(f"messages: they cannot be handed to a chat template ({one_line(error)})") from None
        written, problem = _process(os.getpid()).ask(asked)
        if written is None:
            raise UserError(f"messages: the chat template of {self.name} does not take them ({problem})")
        return written


class _Process:
    """The process that renders; begun anew where a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None

    def ask(self, line: str) -> tuple[str | None, str | None]:
        """The text, or the problem."""
        with self._lock:
            if self._running is None:
                self._running = _started()
            process = self._running
            assert process.stdin is not None
            assert process.stdout is not None
            answer = b""
            try:
                process.stdin.write(line.encode() + b"\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                if not answer.endswith(b"\n"):
                    self._running = None
                    process.kill()
                    process.communicate()
        if answer.endswith(b"\n"):
            text, problem = json.loads(answer)
            return text, problem
        if process.returncode == -signal.SIGXCPU:
            return None, f"it takes more than {SECONDS} s of processor time"
        return None, f"its process ended with {process.returncode}"


@functools.cache
def _process(owner: int) -> _Process:
    """The one of the process `owner`: pipes cannot be shared with a fork."""
    return _Process()


def _started() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is for this process, whose end closes the pipe and so ends the other
    )


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=_NEWEST_TEMPLATES)
def _compiled(text: str) -> Any:
    return _environment().from_string(text)


def _written(text: str, variables: Mapping[str, Any]) -> str:
    """Raises `ValueError` for more characters than there may be, and whatever the template raises."""
    parts, length = [], 0
    for part in _compiled(text).generate(variables):
        parts.append(part)
        length += len(part)
        if length > MOST_CHARACTERS:
            raise ValueError(f"it makes more than {MOST_CHARACTERS} characters of them")
    return "".join(parts)


def _answer(line: bytes) -> bytes:
    """JSON of the text and of the problem, one of which is there."""
    try:
        text, variables = json.loads(line)
        return json.dumps((_written(text, variables), None)).encode()
    except MemoryError:
        problem = f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"
    except Exception as error:  # of the template's own code
        problem = one_line(error)[:500]
    return json.dumps((None, problem)).encode()


def _serve() -> None:
    """Answers lines with lines until there are no more."""
    _environment()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + _MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin.buffer:
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS)
        sys.stdout.buffer.write(_answer(line) + b"\n")
        sys.stdout.buffer.flush()


def _limit(what: int, amount: int) -> None:
    """Lowers the soft limit, which for the processor's time is raised again with each conversation."""
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


if __name__ == "__main__":
    _serve()
