"""Counts attempts and passes signals on; see `vishwamai_mp.launch`."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

from vishwamai_mp.config.errors import HUNG_STATUS, USER_ERROR_STATUS
from vishwamai_mp.launch import NEVER_MET, STOPPED, WORKERS_LOG_LEVEL

_PATIENCE_SECONDS = 900.0  # for machines that do not come together, as torchrun's join_timeout
_BREATH_SECONDS = 2.0  # between attempts


class Launcher:
    """Attempts at one job.

    Args:
        arguments: torchrun's.
        restarts: after failures; that machines do not come together is none, they are waited for.
    """

    def __init__(self, arguments: list[str], restarts: int) -> None:
        self._command = [sys.executable, "-m", "vishwamai_mp.launch.attempt", *arguments]
        # torch shows a page of C++ frames for each lost connection. The attempt says it in a line, and its workers get
        # the level that they would have had.
        level = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
        self._environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "FATAL", WORKERS_LOG_LEVEL: level}
        self._restarts = restarts
        self._wish: signal.Signals | None = None
        self._attempt: subprocess.Popen | None = None

    def run(self) -> int:
        """Attempt until one succeeds, fails for good, or a signal asks to stop.

        Returns:
            the exit status: 0, 1, or HUNG_STATUS where the last attempt hung.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's SIGHUP
                signal.signal(number, self._note)
        failures, met = 0, time.monotonic()
        while True:
            status = self._once()
            if status == 0:
                return 0
            if self._wish is not None:
                if status in (USER_ERROR_STATUS, HUNG_STATUS, 1):
                    return 1
                _say("stopped before the first step; the same command starts it")
                return 0
            if status == USER_ERROR_STATUS:
                return 1
            if status == NEVER_MET:
                if time.monotonic() > met + _PATIENCE_SECONDS:
                    _say(f"not all machines came within {_PATIENCE_SECONDS / 60:.0f} minutes")
                    return 1
                time.sleep(_BREATH_SECONDS)
                continue
            if status == STOPPED:
                _say("a worker was ended by a signal that did not come from here")
            failures += 1
            if failures > self._restarts:
                return HUNG_STATUS if status == HUNG_STATUS else 1
            _say(f"restart {failures} of {self._restarts}; training goes on from its last checkpoint")
            met = time.monotonic()
            time.sleep(_BREATH_SECONDS)

    def _once(self) -> int:
        """One attempt, in a session of its own: a terminal's Ctrl-C comes from here alone."""
        if self._wish is not None:
            return NEVER_MET
        with subprocess.Popen(self._command, env=self._environment, start_new_session=True) as self._attempt:
            told: set[int] = set()
            while True:
                try:
                    return self._attempt.wait(0.2)
                except subprocess.TimeoutExpired:
                    if self._wish is not None:
                        self._pass_on(told)

    def _pass_on(self, told: set[int]) -> None:
        """Give the workers the signal, each once; without workers there is nothing to save."""
        assert self._attempt is not None
        assert self._wish is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = psutil.Process(self._attempt.pid).children()
            if not workers and not told:
                self._attempt.kill()
            for worker in workers:
                if worker.pid not in told:
                    told.add(worker.pid)
                    worker.send_signal(signal.SIGTERM if self._wish == signal.SIGHUP else self._wish)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._wish == number == signal.SIGINT and self._attempt is not None:
            self._attempt.kill()  # Ctrl-C again: at once, without saving
        self._wish = signal.Signals(number)


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Take `--max-restarts` out of the command line; the rest is for the attempts."""
    parser = argparse.ArgumentParser(prog="python -m vishwamai_mp.launch", add_help=False, allow_abbrev=False)
    parser.add_argument("--max-restarts", type=int, default=0)
    options, arguments = parser.parse_known_args()
    return Launcher(arguments, options.max_restarts).run()


if __name__ == "__main__":
    sys.exit(main())
