"""One job per run folder; who is dead is recognised."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vishwamai_mp.checkpoint import lock
from vishwamai_mp.checkpoint.lock import LOCK, Owner, RunLock
from vishwamai_mp.config import UserError

_HOLDER = """
import sys, time
from pathlib import Path
from vishwamai_mp.checkpoint.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the folder."""
    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 2.0)


def write(folder: Path, owner: Owner) -> None:
    (folder / LOCK).write_text(json.dumps(asdict(owner)))


def elsewhere() -> Owner:
    return replace(Owner.this_process(), host="node7", pid=1234, job="77")


def test_a_living_owner_is_named(tmp_path, holder):
    with pytest.raises(UserError, match=f"is in use by process {holder.pid} on .*; stop that job, or name another"):
        RunLock(tmp_path).acquire()
    holder.send_signal(signal.SIGSTOP)  # stopped is not dead
    with pytest.raises(UserError, match="is in use"):
        RunLock(tmp_path).acquire()


def test_a_killed_owner_is_followed_at_once(tmp_path, holder):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead, too
    said: list[str] = []
    mine = RunLock(tmp_path, said.append)
    mine.acquire()
    assert f"was left by process {holder.pid} " in said[0]
    mine.check()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path, holder):
    owner = Owner(**json.loads((tmp_path / LOCK).read_text()))
    write(tmp_path, replace(owner, started="1"))
    RunLock(tmp_path).acquire()


@contextlib.contextmanager
def beating(folder: Path) -> Iterator[None]:
    """The lock's owner, wherever it is, touches it; its clock is far from ours."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.3):
            os.utime(folder / LOCK, (1000, 1000 + time.monotonic()))

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.parametrize(
    "owner",
    [
        {"host": "node7", "pid": 1234, "job": "77"},
        {"machine": "of another container, which has our names and numbers"},
    ],
)
def test_a_sign_of_life_from_another_machine(tmp_path, quick, owner):
    other = replace(Owner.this_process(), **owner)
    write(tmp_path, other)
    with beating(tmp_path), pytest.raises(UserError, match=f"in use by process {other.pid} on {other.host}, job "):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("age", [-86400.0, 0.0, 86400.0])
def test_silence_from_another_machine_whatever_the_clocks_say(tmp_path, quick, age):
    write(tmp_path, elsewhere())
    os.utime(tmp_path / LOCK, (time.time() - age, time.time() - age))
    said: list[str] = []
    begun = time.monotonic()
    RunLock(tmp_path, said.append).acquire()
    assert 1.5 < time.monotonic() - begun < 10
    assert "waiting up to 2 s for a sign of its life" in said[0]


def test_a_copy_of_a_folder_in_use_is_free(tmp_path, quick, holder):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / LOCK).write_bytes((tmp_path / LOCK).read_bytes())
    said: list[str] = []
    mine = RunLock(copy, said.append)
    mine.acquire()
    assert said[-1].endswith("which trains in the folder that this is a copy of; the folder is taken over")
    mine.check()
    with pytest.raises(UserError, match=f"is in use by process {holder.pid} on"):
        RunLock(tmp_path).acquire()


def test_an_owner_shows_signs_of_life(tmp_path, quick):
    mine = RunLock(tmp_path)
    mine.acquire()
    before = (tmp_path / LOCK).stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mine.release()


def test_an_owner_who_wakes_up_too_late_does_not_save(tmp_path):
    mine = RunLock(tmp_path)
    mine.acquire()
    write(tmp_path, elsewhere())
    with pytest.raises(UserError, match="taken over by process 1234 on node7"):
        mine.check()
    mine.release()
    assert (tmp_path / LOCK).exists()  # the other's


def test_a_deleted_lock_is_made_again(tmp_path):
    mine = RunLock(tmp_path)
    mine.acquire()
    (tmp_path / LOCK).unlink()
    mine.check()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    mine.release()


def test_a_torn_lock_has_a_dead_owner(tmp_path, quick):
    (tmp_path / LOCK).write_text('{"host": "no')
    RunLock(tmp_path).acquire()


def test_of_many_who_want_a_dead_ones_folder_one_gets_it(tmp_path, holder):
    holder.kill()
    holder.wait()
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    many = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in many) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    living = [process for process in many if process.poll() is None]
    assert len(living) == 1
    living[0].kill()
    for process in many:
        _, stderr = process.communicate()
        assert process in living or "is in use by process" in stderr


def test_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(lock.errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    mine = RunLock(tmp_path)
    mine.acquire()
    parent = replace(Owner.this_process(), pid=os.getppid(), started=lock._start_of(os.getppid()))
    write(tmp_path, parent)  # another process than this one, and alive
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path).acquire()
