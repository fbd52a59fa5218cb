"""What a program's output meets: an encoding that lacks its characters, a full disk, a closed or broken pipe."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vishwamai_mp.config import UserError

_PROGRAM = """
import sys
from vishwamai_mp.config.errors import run_program
run_program(lambda: print(sys.argv[1]))
"""


def run(
    text: str, output: str = "", encoding: str = "utf-8", program: str = _PROGRAM
) -> subprocess.CompletedProcess[bytes]:
    command = f'exec "$@" {output}'
    return subprocess.run(
        ["bash", "-c", command, "-", sys.executable, "-c", program, text],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=60,
        preexec_fn=_hear_interrupts,
    )


def _hear_interrupts() -> None:
    """What a shell runs in the background ignores them, and what that runs inherits this."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_characters_that_an_encoding_lacks_are_spelled() -> None:
    assert run("é ☃").stdout == "é ☃\n".encode()
    done = run("é ☃", encoding="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xe9 \\u2603\n", b"")


def test_a_name_that_is_too_long_is_one_line() -> None:
    program = _PROGRAM.replace("print(sys.argv[1])", "__import__('pathlib').Path(sys.argv[1] * 300).is_dir()")
    done = run("x", program=program)
    assert done.returncode == 1
    assert done.stderr.decode().startswith(f"error: {'x' * 300}: a file's name cannot be so long; check")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_output_to_a_full_disk_is_one_line(size: int) -> None:
    program = _PROGRAM.replace("sys.argv[1]", f"'x' * {size}")
    done = run("", ">/dev/full", program=program)
    assert done.returncode == 1
    assert done.stderr == b"error: no space left on the disk that the output is written to\n"


def test_a_closed_output_is_no_fault() -> None:
    done = run("x", ">&-")
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_ends_a_line_in_a_message_is_spelled() -> None:
    assert str(UserError("a\nb\x1b[2J\u2028ü\ud800")) == "a\\nb\\x1b[2J\\u2028ü\\ud800"


def test_an_interrupt_is_one_line_while_modules_are_imported_too(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    beside = f"import sys\nsys.path.append({str(tmp_path)!r})\n"
    importing = run("", program=f"{beside}import vishwamai_mp, slow")
    assert (importing.returncode, importing.stderr) == (-signal.SIGINT, b"interrupted\n")  # a shell makes 130 of it
    running = run("", program=_PROGRAM.replace("print(sys.argv[1])", "__import__('signal').raise_signal(2)"))
    assert (running.returncode, running.stderr) == (130, b"interrupted\n")


def test_an_interrupt_of_a_users_own_program_keeps_its_stack() -> None:
    done = run("", program="import vishwamai_mp, signal\ndef own():\n    signal.raise_signal(2)\nown()")
    assert b"in own\n" in done.stderr


def test_a_missing_extra_is_one_line() -> None:
    missing = "exec(\"raise ModuleNotFoundError(name='matplotlib')\")"
    done = run("", program=_PROGRAM.replace("print(sys.argv[1])", missing))
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: this program needs matplotlib, which is not installed: pip install ")
    assert done.stderr.count(b"\n") == 1
