"""Watches the ranks of a machine, from a process of its own: what hangs cannot hold it up.

Machines meet in a folder of the run folder, which all of them see: a job cannot train without it, while a store that a
rank keeps would hang with that rank. As long as nothing is wrong, nothing is written there, and each machine looks once
in two seconds whether another has raised an alarm. Then all write what their ranks do; whoever raised the alarm judges,
and whoever first writes its verdict reports. Where one machine has all ranks, nothing is exchanged.
"""

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from vishwamai_mp.diagnosis import hang_report, shared
from vishwamai_mp.diagnosis.local_ranks import LocalRank
from vishwamai_mp.diagnosis.shared import Ending, Word
from vishwamai_mp.diagnosis.state import DEAD, RankState
from vishwamai_mp.diagnosis.verdict import Verdict, judge

_POLL_SECONDS = 0.5
_LOOK_POLLS = 4  # between looks for another machine's alarm
_STACKS_SECONDS = 20.0  # between stacks of one rank, while an alarm lasts
_PATIENCE_SECONDS = 20.0  # for other machines' answers
_WRITE_SECONDS = 10.0  # that writing the report may take, on a disk that may be what hangs
_MERCY_SECONDS = 3.0  # in which ranks may end by themselves, with a status that says why
_BIRTH_SECONDS = 120.0  # in which the ranks of this machine must have appeared
_LEFT_SECONDS = 3600.0  # without a sign of life: a job's shared words may be removed
_ALARM, _VERDICT = "alarm", "verdict.json"


class Watchdog:
    """Of one machine.

    Args:
        folder: in shared memory, where this machine's ranks keep their journals; removed at the end.
        meeting: the folder where machines exchange what they know; the run folder is two above it.
        ranks: of this machine.
        world_size: ranks of the job.
        limits: seconds, by the names of the section `watchdog`.
    """

    def __init__(
        self, folder: str, meeting: str, ranks: Sequence[int], world_size: int, limits: Mapping[str, float]
    ) -> None:
        self.folder, self.meeting, self.limits, self.world_size = Path(folder), Path(meeting), limits, world_size
        self.run = self.meeting.parent.parent
        self.ranks = [LocalRank(self.folder, rank) for rank in ranks]
        self.is_alone = len(ranks) == world_size
        self._own = self.meeting / f"from_rank_{ranks[0]}.json"
        self._counts_from = 0
        self._dead: set[int] = set()
        self._stacks_taken = self._alarm_since = 0.0
        self._heard: dict[Path, tuple[str, float]] = {}  # what each machine wrote, and when that last changed
        self._suspected: Verdict | None = None
        self._verdict: Verdict | None = None
        self._gone_since = 0.0

    def run_until_ranks_end(self) -> None:
        """Look again and again."""
        polls, before, born = 0, time.monotonic(), time.monotonic()
        while True:
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if now - before > _POLL_SECONDS + 5:  # all of this machine stood still, a suspended job for one
                self._counts_from = time.monotonic_ns()
            before, polls = now, polls + 1
            there = [rank.is_there() for rank in self.ranks]
            if not all(there):
                if now - born > _BIRTH_SECONDS:
                    break
                continue
            late = [rank for rank in self.ranks if rank.is_late(self.limits, self._counts_from)]
            dead, deserted = self._fallen()
            if self._are_over(dead):
                break
            wrong = bool(late or deserted or dead)
            if wrong or (not self.is_alone and polls % _LOOK_POLLS == 0 and self._hears_alarm()):
                try:
                    self._look_closer(wrong)
                except OSError as error:  # of the run folder, which may be what hangs
                    print(f"watchdog: {error}", file=sys.stderr, flush=True)
            elif self._alarm_since:
                self._all_clear()
        self._leave()

    def _fallen(self) -> tuple[set[int], bool]:
        """Ranks that died without a word, seen so twice; and whether some were deserted."""
        dead = {rank.rank for rank in self.ranks if rank.process() == DEAD and not rank.words[Word.ENDING]}
        twice, self._dead = dead & self._dead, dead
        return twice, any(rank.words[Word.ENDING] == Ending.DESERTED for rank in self.ranks)

    def _are_over(self, dead: set[int]) -> bool:
        """Whether nothing is left to watch: all ranks have ended, or all were killed together."""
        endings = [rank.words[Word.ENDING] for rank in self.ranks]
        if len(dead) == len(self.ranks):
            return True
        if not all(ending or rank.rank in dead for ending, rank in zip(endings, self.ranks, strict=True)):
            return False
        self._gone_since = self._gone_since or time.monotonic()
        told = self._verdict or not (dead or Ending.DESERTED in endings) or Ending.FAILED in endings
        return bool(told) or time.monotonic() - self._gone_since > _BIRTH_SECONDS

    def _look_closer(self, wrong: bool) -> None:
        """What the ranks of all machines do, and what follows from it."""
        if self._verdict is not None:
            self._carry_out(self._verdict)
            return
        now = time.monotonic()
        self._alarm_since = self._alarm_since or now
        if now - self._stacks_taken > _STACKS_SECONDS and (not self.is_alone or self._suspected):
            self._stacks_taken = now
            for rank in self.ranks:
                rank.take_stacks()
        states = {rank.rank: rank.state(self.limits, self._counts_from) for rank in self.ranks}
        if not self.is_alone:
            states = self._exchanged(states, wrong)
            if (self.meeting / _VERDICT).exists():
                self._carry_out(Verdict(**json.loads((self.meeting / _VERDICT).read_text())))
                return
            if len(states) < self.world_size and now - self._alarm_since < _PATIENCE_SECONDS:
                return
        if not wrong:
            return
        verdict, before = judge(self.world_size, states), self._suspected
        self._suspected = verdict
        # Twice, with stacks taken between: what a signal wakes up did not hang.
        if verdict is None or before is None or verdict.ranks != before.ranks:
            return
        if self.is_alone or hang_report.write_new(self.meeting / _VERDICT, json.dumps(asdict(verdict))):
            self._report(verdict, states)
        self._carry_out(verdict)

    def _exchanged(self, own: dict[int, RankState], wrong: bool) -> dict[int, RankState]:
        """Tell the other machines what ours do, and hear what theirs do."""
        self.meeting.mkdir(parents=True, exist_ok=True)
        if wrong:
            (self.meeting / _ALARM).touch()
        hang_report.replace(self._own, json.dumps([state.to_dict() for state in own.values()]))
        now, states = time.monotonic(), dict(own)
        for path in self.meeting.glob("from_rank_*.json"):
            text = path.read_text()
            if self._heard.get(path, ("", 0.0))[0] != text:
                self._heard[path] = text, now
            elif now - self._heard[path][1] > _PATIENCE_SECONDS / 2:
                continue  # it has fallen silent since
            for state in map(RankState.from_dict, json.loads(text)):
                states.setdefault(state.rank, state)
        return states

    def _hears_alarm(self) -> bool:
        return (self.meeting / _ALARM).exists() or (self.meeting / _VERDICT).exists()

    def _all_clear(self) -> None:
        """What took long has ended."""
        self._alarm_since, self._suspected = 0.0, None
        with contextlib.suppress(OSError):
            self._own.unlink(missing_ok=True)
            if not self.is_alone:
                (self.meeting / _ALARM).unlink(missing_ok=True)

    def _report(self, verdict: Verdict, states: Mapping[int, RankState]) -> None:
        """Say it once, and write it down."""
        text = hang_report.to_text(verdict, states, self.run)
        print(text, file=sys.stderr, flush=True)

        def write() -> None:
            try:
                hang_report.write_report(self.run, verdict, states, text)
            except OSError as error:
                print(f"{self.run / hang_report.NAME}.json: cannot be written ({error.strerror})", file=sys.stderr)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(_WRITE_SECONDS)

    def _carry_out(self, verdict: Verdict) -> None:
        """End the ranks of this machine, unless they end by themselves."""
        if self._verdict is None:
            silence_errors()
        self._verdict = verdict
        if verdict.is_ending:
            return
        for rank in self.ranks:
            rank.words[Word.SENTENCE] = 1
        deadline = time.monotonic() + _MERCY_SECONDS
        while time.monotonic() < deadline and any(rank.process() != DEAD for rank in self.ranks):
            time.sleep(0.1)
        for rank in self.ranks:
            rank.end()

    def _leave(self) -> None:
        for rank in self.ranks:
            for path in self.folder.glob(f"rank_{rank.rank}.*"):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another launcher on this machine has ranks of the job, too
            self.folder.rmdir()
        if self.ranks[0].rank == 0 and self._verdict is None:
            shutil.rmtree(self.meeting, ignore_errors=True)


def silence_errors() -> None:
    """Let this machine's ranks be silent about their errors, which are consequences (`runtime.failure`)."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # of the rank that started this process
    if error_file is not None:
        with contextlib.suppress(OSError):
            Path(error_file).parent.parent.joinpath("failed").touch()


def sweep(folder: Path) -> None:
    """Remove what jobs left whose watchdogs were killed with them.

    A process of another container is not seen, but its journal's beat is; a suspended one has no beat, but a process.

    Args:
        folder: of the shared words of this job; the others' are beside it.
    """
    for other in folder.parent.glob("vishwamai-*"):
        paths = list(other.glob("*.words"))
        if other == folder or not paths:
            continue
        with contextlib.suppress(OSError, ValueError):
            found = [shared.map_words(path) for path in paths]
            silent = min(time.monotonic_ns() - words[Word.BEAT] for words in found) / 1e9
            if silent > _LEFT_SECONDS and not any(psutil.pid_exists(words[Word.PID]) for words in found):
                shutil.rmtree(other, ignore_errors=True)


def main(orders: str) -> None:
    """Watch.

    Args:
        orders: JSON, the arguments of `Watchdog`.
    """
    watchdog = Watchdog(**json.loads(orders))
    sweep(watchdog.folder)
    watchdog.run_until_ranks_end()
