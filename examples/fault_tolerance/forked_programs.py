"""Starts Python programs as forks of a process that has the stack imported already: they begin within milliseconds.

`begin()` imports torch, megatron-core and the trainer, and changes how this process starts Python modules from then on.
What is started so is a process with a parent, a session, an environment, open files and signals of its own, as if it
had been executed, and starts its own children in the same way. It only does not import what it finds imported.
"""

import atexit
import importlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

_PROGRAMS = ("vishwamai_mp.launch", "vishwamai_mp.launch.attempt", "vishwamai_mp.pretrain")
_STACK = (
    "vishwamai_mp.data.given",
    "vishwamai_mp.launch.attempt",
    "vishwamai_mp.training.callbacks",
    "vishwamai_mp.training.loop",
)
_execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]


_scripts: list[str] = []


def begin(*scripts: str) -> None:
    """Import the stack and fork what is started as `python -m` one of this project's programs.

    Args:
        scripts: paths of files that are forked as well where they are started as `python PATH`.
    """
    _scripts.extend(scripts)
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported; a fork has one thread only
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the launcher sets it, before torch is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, about Transformer Engine and apex
        for name in _STACK:
            importlib.import_module(name)
    subprocess.Popen._execute_child = _start  # type: ignore[attr-defined]


def _start(process: Any, args: Any, *rest: Any) -> None:
    """What `subprocess.Popen` calls to start its process; `rest` as Python 3.11 and 3.12 order it."""
    program = _program(args)
    if program is None:
        _execute(process, args, *rest)
        return
    environment, start_new_session = rest[5], rest[20]
    pipes = rest[9:15]  # (its own end, ours) of standard input; (ours, its own) of output and errors
    sys.stdout.flush()
    sys.stderr.flush()
    process.pid = os.fork()
    if process.pid == 0:
        _become(program, environment, start_new_session, [pipes[0], pipes[3], pipes[5]])
    process._child_created = True
    process._close_pipe_fds(*pipes)


def _program(args: Any) -> list[str] | None:
    """Of a command line `python [-u] [-m] program ...`, the program and its arguments, where it is one of ours."""
    if not isinstance(args, list | tuple) or args[0] != sys.executable:
        return None
    rest = list(args[2:] if args[1] == "-u" else args[1:])
    if rest[0] == "-m" and rest[1] in _PROGRAMS:
        return rest[1:]
    return rest if rest[0] in _scripts else None


def _become(program: list[str], environment: Any, session: bool, streams: Sequence[int]) -> NoReturn:
    """Make a new process of this fork, and run the program in it."""
    status = 1
    try:
        atexit._clear()  # the parent's: its temporary folders are not ours to delete
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        if session:
            os.setsid()
        for own, given in enumerate(streams):
            if given != -1:
                os.dup2(given, own)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        sys.argv = list(program)
        status = _run(program[0])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _run(program: str) -> int:
    """Returns the exit status."""
    status: Any = 0
    try:
        if program in _scripts:
            runpy.run_path(program, run_name="__main__")
        else:
            sys.modules.pop(program, None)  # it is to run, as __main__, not to be found imported
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status or 0
