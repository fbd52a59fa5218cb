"""Errors that are the user's to mend, and the one way a program reports them."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable

from vishwamai_mp.config.wording import EXTRAS, lacks

USER_ERROR_STATUS = 78  # of a worker in a job, for its launcher: trying again is of no use (EX_CONFIG of sysexits.h)
HUNG_STATUS = 79  # of a worker that the watchdog ended because the job hung; trying again may help
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of the operating system's errors: a disk or a quota is full


class UserError(ValueError):
    """A mistake the user can mend.

    Args:
        message: one line: what, which value, what to do. Names and values that it quotes may hold what ends a line or
            acts on a terminal; that is spelled, as \\n or \\x1b.
        beneath: further lines, such as a table of what to change.
    """

    def __init__(self, message: str = "", *beneath: str) -> None:
        super().__init__(message, *beneath)

    def __str__(self) -> str:
        return "\n".join(map(_spelled, self.args))


class ConfigError(UserError):
    """A setting that cannot work. The message names the key, the value and the mend."""


def _spelled(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def leave_out(key: str) -> str:
    """The mend where `key` should not be set, whoever set it."""
    return f"leave it out ({key}=null undoes a recipe's)"


def one_line(error: BaseException) -> str:
    """What an error says, for a message of one line; its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's `main` and exit: 0 on success, 1 with one line on stderr for a user's mistake, 130 by Ctrl-C,
    and 128 + its number by a signal that was raised as an interrupt that has it.

    Only `UserError`, a user's interrupt, an extra that is not installed and what `about_the_system` knows are turned
    into a line; anything else is a defect of ours and keeps its traceback.
    """
    spell_what_the_terminal_cannot()
    try:
        code = main() or 0
        if sys.stdout is not None:  # None: closed
            sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(f"error: {lacks('this program', error.name)}")
    except KeyboardInterrupt as interrupt:
        if sys.stderr is not None:
            print("interrupted", file=sys.stderr)
        number = next((value for value in interrupt.args if isinstance(value, int)), signal.SIGINT)
        sys.exit(128 + number)
    except BrokenPipeError:  # the reader of our output, `head` for one, has gone
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        line = about_the_system(error)
        if line is None:
            raise
        if error.errno in NO_SPACE:
            with contextlib.suppress(OSError):  # what is still to be written would fail again when the program ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(f"error: {line}")


def about_the_system(error: BaseException) -> str | None:
    """What to say of an operating system's error that may meet any file and that its user can mend: a full disk, and a
    name longer than file systems take, which Python raises even where it only asks whether something is there.

    None: it is another error.
    """
    if not isinstance(error, OSError):
        return None
    file = error.filename and _spelled(str(error.filename))
    if error.errno in NO_SPACE:
        return f"no space left on the disk that {file or 'the output'} is written to"
    if error.errno == errno.ENAMETOOLONG:
        return f"{file}: a file's name cannot be so long; check what was given as a path"
    return None


def spell_what_the_terminal_cannot() -> None:
    """Characters that the output's encoding lacks (LANG=C, PYTHONIOENCODING=ascii) are written as \\u…: no program
    that has computed for hours should end at one."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and (out.errors == "strict" or out.encoding.lower() != "utf-8"):
        out.reconfigure(errors="backslashreplace")
