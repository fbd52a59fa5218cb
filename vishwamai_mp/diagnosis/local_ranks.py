"""Looks at the ranks of this machine from outside: their shared words, their processes, their stacks."""

import contextlib
import ctypes
import math
import os
import re
import signal
import socket
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from vishwamai_mp.diagnosis import shared
from vishwamai_mp.diagnosis.shared import Ending, Kind, Operation, Phase, Word
from vishwamai_mp.diagnosis.state import DEAD, STOPPED, TRACED, Membership, RankState, Wait

STACK_SIGNAL = signal.SIGRTMIN + 10 if hasattr(signal, "SIGRTMIN") else None  # a rank then writes its stacks
_STACK_SECONDS = 1.0  # that a rank has to do so
_JOURNAL = "vishwamai_mp/runtime/step_journal.py"
_RECENT = 512  # collectives of a group that are compared: a rank may run ahead of others by micro-batches
_STATES = {psutil.STATUS_STOPPED: STOPPED, psutil.STATUS_TRACING_STOP: TRACED, psutil.STATUS_ZOMBIE: DEAD}


class LocalRank:
    """A rank of this machine.

    Args:
        folder: of the shared words.
        rank: which.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.words: Any = None
        self._process: psutil.Process | None = None
        self._cpu = (0.0, 0.0, math.nan)  # seconds used, at which time, share
        self._stacks: list[list[str]] = []
        self._frozen: list[int] | None = None  # the words of a stopped rank, from before it ran to write its stacks

    def is_there(self) -> bool:
        """Whether it has begun its journal."""
        if self.words is None:
            with contextlib.suppress(OSError, ValueError):
                words = shared.map_words(shared.file_of(self.folder, self.rank))
                if words[Word.PID]:
                    self.words = words
        if self.words is not None and self._process is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process = psutil.Process(self.words[Word.PID])
        return self.words is not None

    def process(self) -> str:
        """The state of its process. One that was gone before it was first seen is dead."""
        if self._process is None or not self._process.is_running():
            return DEAD
        try:
            state = self._process.status()
            times = self._process.cpu_times()
        except psutil.Error:
            return DEAD
        used, now = times.user + times.system, time.monotonic()
        if now - self._cpu[1] > 0.4:
            share = (used - self._cpu[0]) / (now - self._cpu[1]) if self._cpu[1] else math.nan
            self._cpu = used, now, share
        return _STATES.get(state, state)

    def state(self, limits: Mapping[str, float], counts_from: int) -> RankState:
        """What is known of it.

        Args:
            limits: seconds, by the names of the section `watchdog`.
            counts_from: nanoseconds; time before it does not count: the whole machine slept.
        """
        now, process = time.monotonic_ns(), self.process()
        words = self._words()
        phase, ending = Phase(words[Word.PHASE]), Ending(words[Word.ENDING])
        groups = shared.read_groups(shared.groups_of(self.folder, self.rank))
        return RankState(
            rank=self.rank,
            host=socket.gethostname(),
            pid=words[Word.PID],
            process=process,
            beat_seconds=(now - words[Word.BEAT]) / 1e9,
            cpu=self._cpu[2],
            ending=ending.name.lower(),
            phase=phase.text,
            seconds=(now - max(words[Word.SINCE], counts_from)) / 1e9,
            limit=_limit(words, limits),
            step=words[Word.STEP],
            micro_batch=words[Word.PASSES],
            waiting=self._waiting(groups, now),
            groups=self._memberships(groups),
            stacks=self._stacks,
        )

    def is_late(self, limits: Mapping[str, float], counts_from: int) -> bool:
        """Whether its phase takes longer than it may; cheap."""
        words = self._words()
        since = max(words[Word.SINCE], counts_from)
        return not words[Word.ENDING] and (time.monotonic_ns() - since) / 1e9 > _limit(words, limits)

    def _words(self) -> Any:
        if self._frozen is not None and self._process is not None:
            with contextlib.suppress(psutil.Error):
                if self._process.status() == psutil.STATUS_STOPPED:
                    return self._frozen
            self._frozen = None
        return self.words

    def _waiting(self, groups: list[shared.Group], now: int) -> Wait | None:
        words = self._words()
        number = words[Word.WAITS_FOR]
        if not number or words[Word.EVENT_COUNT] - number >= shared.EVENTS:
            return None
        event = shared.read_event(words, number - 1)
        name = groups[event.group].name if event.group < len(groups) else ""
        seconds = (now - words[Word.WAITS_SINCE]) / 1e9
        return Wait(Operation(event.code).name, name, event.number, event.peer, event.size, seconds)

    def _memberships(self, groups: list[shared.Group]) -> dict[str, Membership]:
        words = self._words()
        recent: dict[int, list[tuple[int, str, int]]] = {}
        for event in shared.events(words):
            if event.kind is Kind.BEGINS and event.number:
                recent.setdefault(event.group, []).append((event.number, Operation(event.code).name, event.size))
        return {
            group.name: Membership(
                group.description, group.ranks, words[shared.COUNTS + number], recent.get(number, [])[-_RECENT:]
            )
            for number, group in enumerate(groups)
        }

    def take_stacks(self) -> None:
        """Ask the process for its stacks, also one that is stopped: it runs for as long as that takes."""
        if self._process is None or STACK_SIGNAL is None or self.words[Word.ENDING]:
            return
        path, process = shared.stacks_of(self.folder, self.rank), self._process
        with contextlib.suppress(OSError, AttributeError, psutil.Error):  # glibc has tgkill since 2.30
            before, stopped = path.stat().st_size, process.status() == psutil.STATUS_STOPPED
            # To the main thread: while another one wrote, the main thread of a stopped process would move on.
            ctypes.CDLL(None).tgkill(process.pid, process.pid, int(STACK_SIGNAL))
            if stopped:
                self._frozen = self._frozen or list(self.words)
                process.send_signal(signal.SIGCONT)
            size, deadline = before, time.monotonic() + _STACK_SECONDS
            while time.monotonic() < deadline:
                time.sleep(0.002)
                size, last = path.stat().st_size, size
                if size == last > before:
                    break
            if stopped:
                process.send_signal(signal.SIGSTOP)
                while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline + _STACK_SECONDS:
                    time.sleep(0.001)  # it takes a moment
            if size > before:
                with path.open("rb") as file:
                    file.seek(before)
                    self._stacks = read_stacks(file.read().decode(errors="replace"))

    def end(self) -> None:
        """End the process, if it is still there."""
        with contextlib.suppress(psutil.Error):
            if self._process is not None and self._process.is_running():
                self._process.kill()


def _limit(words: Any, limits: Mapping[str, float]) -> float:
    """Seconds that the phase a rank is in may take."""
    phase = Phase(words[Word.PHASE])
    if phase.is_computing:
        done = min(words[Word.STEPS], shared.DURATIONS)
        if not done:
            return limits["first_step_seconds"]
        median = statistics.median(words[shared.LENGTHS : shared.LENGTHS + done]) / 1e9
        return max(limits["step_seconds"], limits["step_factor"] * median)
    named = {Phase.BATCH: "data_seconds", Phase.EVALUATION: "evaluation_seconds", Phase.SAVE: "save_seconds"}
    return limits[named.get(phase, "other_seconds")]


def read_stacks(text: str) -> list[list[str]]:
    """The stacks that faulthandler wrote, as lists of "file:line function", the main thread's first.

    Threads that Python started end in its threading module, the main thread in the program.
    """
    stacks = []
    for block in re.split(r"^(?:Current thread|Thread) 0x.*\n", text, flags=re.MULTILINE):
        frames = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', block, re.MULTILINE)
        shown = [(_short(file), line, function) for file, line, function in frames]
        # How a collective came to be noted is not what the rank does.
        lines = [f"{file}:{line} {function}" for file, line, function in shown if file != _JOURNAL]
        if lines:
            stacks.append(lines)
    return sorted(stacks, key=lambda stack: stack[-1].endswith(" _bootstrap"))


def _short(path: str) -> str:
    for folder, shown in (("/site-packages/", ""), ("/vishwamai_mp/", "vishwamai_mp/")):
        if folder in path:
            return shown + path.rsplit(folder, 1)[1]
    return path if path.startswith("<") else os.sep.join(path.split(os.sep)[-2:])
