"""A watchdog beside processes that write journals and hang: they need no torch."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vishwamai_mp.diagnosis import shared
from vishwamai_mp.diagnosis.local_ranks import STACK_SIGNAL, read_stacks
from vishwamai_mp.diagnosis.shared import Ending, Phase, Word
from vishwamai_mp.diagnosis.watchdog import Watchdog, sweep

_LIMITS = {
    **dict.fromkeys(("step_seconds", "first_step_seconds", "data_seconds", "save_seconds", "other_seconds"), 1.5),
    "evaluation_seconds": 600.0,
    "step_factor": 10.0,
}
# A rank that is in a phase, and never leaves it.
_RANK = """
import faulthandler, sys, time
from pathlib import Path
from vishwamai_mp.diagnosis import shared
from vishwamai_mp.diagnosis.shared import Word
folder, rank, phase = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
faulthandler.register(%d, shared.stacks_of(folder, rank).open("wb"))
words = shared.map_words(shared.file_of(folder, rank), make=True)
words[Word.SINCE] = words[Word.BEAT] = time.monotonic_ns()
words[Word.PHASE] = phase
import os
words[Word.PID] = os.getpid()
def hangs_here():
    while not words[Word.SENTENCE]:
        time.sleep(0.05)
hangs_here()
sys.exit(79)
"""


class Machine:
    """Ranks in a folder, and the watchdog beside them."""

    def __init__(self, folder: Path, run: Path, ranks: dict[int, Phase], world_size: int) -> None:
        folder.mkdir()
        program = _RANK % (STACK_SIGNAL or 0)
        self.processes = {
            rank: subprocess.Popen([sys.executable, "-c", program, str(folder), str(rank), str(int(phase))])
            for rank, phase in ranks.items()
        }
        self.folder = folder
        self.watchdog = Watchdog(str(folder), str(run / "watch/token"), list(ranks), world_size, _LIMITS)
        self.thread = threading.Thread(target=self.watchdog.run_until_ranks_end, daemon=True)
        self.thread.start()

    def words(self, rank: int) -> memoryview:
        path = shared.file_of(self.folder, rank)
        while not path.exists() or not path.stat().st_size:  # made, and then as long as it will be
            time.sleep(0.02)
        words = shared.map_words(path)
        while not words[Word.PID]:  # the last to be written: whoever is killed before it is not known to have ended
            time.sleep(0.02)
        return words

    def end(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


@contextlib.contextmanager
def machines(*given: Machine) -> Iterator[None]:
    try:
        yield
    finally:
        for machine in given:
            machine.end()
        for machine in given:
            machine.thread.join(30)
            assert not machine.thread.is_alive()
            assert not machine.folder.exists()


def test_a_stopped_rank_is_reported_with_its_stack_and_all_end(tmp_path, capfd):
    machine = Machine(tmp_path / "here", tmp_path, {0: Phase.BACKWARD, 1: Phase.BACKWARD}, 2)
    with machines(machine):
        machine.words(1)
        machine.processes[1].send_signal(signal.SIGSTOP)
        assert machine.processes[0].wait(20) == 79
        assert machine.processes[1].wait(20) == -signal.SIGKILL
    report = json.loads((tmp_path / "hang_report.json").read_text())
    assert report["ranks_at_fault"] == [1]
    assert [state["process"] for state in report["ranks"]] == ["sleeping", "stopped"]
    assert all(state["stacks"][0][0].endswith(" hangs_here") for state in report["ranks"])
    text = (tmp_path / "hang_report.txt").read_text()
    assert capfd.readouterr().err == text
    assert text.startswith("the job hangs: rank 1 (")


def test_two_machines_put_together_what_they_know(tmp_path):
    """The first machine's rank waits, and its watchdog raises the alarm; the second's evaluates, and is not late."""
    waiting = Machine(tmp_path / "a", tmp_path, {0: Phase.BACKWARD}, 2)
    evaluating = Machine(tmp_path / "b", tmp_path, {1: Phase.EVALUATION}, 2)
    with machines(waiting, evaluating):
        group = shared.Group("7", "world", [0, 1])
        shared.groups_of(waiting.folder, 0).write_text(group.line())
        words = waiting.words(0)
        words[shared.RING] = time.monotonic_ns()
        words[shared.RING + 1] = shared.pack_event(shared.Kind.BEGINS, shared.Operation.all_reduce, 0, 1, 0)
        words[shared.RING + 2] = shared.pack_place(1, -1)
        words[shared.COUNTS] = words[Word.EVENT_COUNT] = words[Word.WAITS_FOR] = 1
        time.sleep(6)  # what rank 1 does may take as long
        assert (tmp_path / "watch/token/alarm").exists()
        assert not (tmp_path / "hang_report.json").exists()
        assert waiting.processes[0].poll() is None
        evaluating.words(1)[Word.PHASE] = Phase.SAVE  # which may not
        assert waiting.processes[0].wait(20) == evaluating.processes[1].wait(20) == 79
    report = json.loads((tmp_path / "hang_report.json").read_text())
    assert report["ranks_at_fault"] == [1]
    assert report["operation"] == "all_reduce, number 1 of world (ranks 0-1)"
    assert report["waiting"] == [0]


@pytest.mark.parametrize("ending", [Ending.DONE, Ending.FAILED])
def test_ranks_that_end_leave_nothing_to_say(tmp_path, ending):
    machine = Machine(tmp_path / "here", tmp_path, {0: Phase.EVALUATION, 1: Phase.EVALUATION}, 2)
    with machines(machine):
        machine.words(0)[Word.ENDING] = ending
        machine.words(1)[Word.ENDING] = Ending.DONE if ending == Ending.DONE else Ending.DESERTED
        machine.thread.join(10)
        assert not machine.thread.is_alive()
    assert not (tmp_path / "hang_report.json").exists()
    assert not (tmp_path / "watch").exists() or not list((tmp_path / "watch").iterdir())


def test_a_job_that_is_killed_as_a_whole_does_not_hang(tmp_path):
    machine = Machine(tmp_path / "here", tmp_path, {0: Phase.EVALUATION, 1: Phase.EVALUATION}, 2)
    with machines(machine):
        for rank in (0, 1):
            machine.words(rank)
        machine.end()
    assert not (tmp_path / "hang_report.json").exists()


def test_what_killed_jobs_left_is_removed_and_what_lives_is_not(tmp_path):
    def words(name: str, pid: int, seconds: float) -> Path:
        folder = tmp_path / f"vishwamai-{name}"
        folder.mkdir()
        made = shared.map_words(shared.file_of(folder, 0), make=True)
        made[Word.PID], made[Word.BEAT] = pid, time.monotonic_ns() - int(seconds * 1e9)
        return folder

    nobody = 2**22 + 1  # beyond Linux's largest process id
    own, left = words("own", nobody, 9e3), words("left", nobody, 9e3)
    alive = [words("elsewhere", nobody, 1.0), words("suspended", os.getpid(), 9e3)]
    sweep(own)
    assert not left.exists()
    assert all(folder.exists() for folder in (own, *alive))


def test_stacks_begin_with_the_main_thread():
    text = (
        "Thread 0x01 (most recent call first):\n"
        '  File "/usr/lib/python3/threading.py", line 5 in wait\n'
        '  File "/usr/lib/python3/threading.py", line 9 in _bootstrap\n\n'
        "Current thread 0x02 (most recent call first):\n"
        '  File "/x/vishwamai_mp/runtime/step_journal.py", line 1 in waiting\n'
        '  File "/x/site-packages/torch/nn/modules/module.py", line 2 in inner\n'
        '  File "/x/vishwamai_mp/training/loop.py", line 3 in _step\n'
        '  File "<string>", line 4 in <module>\n'
    )
    assert read_stacks(text) == [
        ["torch/nn/modules/module.py:2 inner", "vishwamai_mp/training/loop.py:3 _step", "<string>:4 <module>"],
        ["python3/threading.py:5 wait", "python3/threading.py:9 _bootstrap"],
    ]
