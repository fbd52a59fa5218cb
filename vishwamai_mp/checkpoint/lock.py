"""One job per run folder: two would delete each other's unfinished checkpoints and interleave their metrics.

The folder's owner is whoever `run.lock` names: host, process, job, since when. The lock is made with link(2), which is
atomic on local disks and on NFS, where flock(2) may be local to a machine or missing. It is deleted at the end; one
left by a killed job is recognised in two ways:

- on the same machine (host, boot and process namespace) by asking the kernel whether that process still lives, with
  its start time, since numbers are used again. A process that is merely stopped lives. In a copy of its folder, which
  has another inode, the lock names a living process that is elsewhere; there the next rule decides.
- from another machine by a sign of life: the owner touches the file every BEAT_SECONDS, and whoever wants the folder
  watches the time of its last change. It needs no clocks that agree: only whether the time changes counts. After
  SILENCE_SECONDS without a change the owner counts as dead.

An owner that was silent for so long and wakes up, stopped or cut off, finds another's name in the lock before it next
saves, and ends there. Needs no torch.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from vishwamai_mp.config import UserError
from vishwamai_mp.config.files import aside_of, write_through
from vishwamai_mp.config.json_text import parse_json

LOCK = "run.lock"
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 30.0
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True)
class Owner:
    """A process that trains in a run folder."""

    host: str
    machine: str  # boot and process namespace: only within them is `pid` a name
    pid: int
    started: str  # of the process, in ticks since boot; "" where the system does not tell
    job: str
    since: str
    token: str
    folder: int = 0  # inode; 0: not known

    @classmethod
    def this_process(cls, folder: int = 0) -> "Owner":
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or "none"
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _start_of(pid), job, since, secrets.token_hex(8), folder)

    @property
    def is_here(self) -> bool:
        """Whether this machine's kernel knows the process."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def lives_here(self) -> bool:
        """Whether another process of this machine than the asking one is this owner."""
        try:
            dead = psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        return not dead and self.pid != os.getpid() and _start_of(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, job {self.job}, since {self.since}"


class RunLock:
    """The lock of a run folder, held from `acquire` to `release`.

    Args:
        folder: the run folder; exists.
        say: for the person who watches.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.path = folder / LOCK
        self._say = say
        self._me: Owner | None = None
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the folder, be it from a dead owner.

        Raises:
            UserError: a living job has it; or the folder cannot be written.
        """
        try:
            self._me = Owner.this_process(self.path.parent.stat().st_ino)
            while not self._make():
                owner = self._owner()
                if owner is not None:
                    self._refuse_if_alive(owner)
                    self._remove(owner)
        except OSError as error:
            raise UserError(
                f"training.output_dir={self.path.parent}: cannot be written ({error.strerror}); name another"
            ) from None
        self._ended.clear()
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def check(self) -> None:
        """Make sure that the folder is still ours. Call it before changing what another job would change too.

        Raises:
            UserError: another job took it while this one was silent.
        """
        if self._me is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)  # somebody deleted the folder, or only the lock
        owner = self._owner()
        if owner is None and self._make():
            return
        owner = owner or self._owner()
        if owner is not None and owner.token != self._me.token:
            self._me = None
            raise UserError(
                f"{self.path.parent} has been taken over by {owner}, while this job gave no sign of life for"
                f" {SILENCE_SECONDS:.0f} s; it ends without saving"
            )

    def release(self) -> None:
        """Give the folder back, if it is ours."""
        self._ended.set()
        if self._me is not None:
            with contextlib.suppress(OSError):
                owner = self._owner()
                if owner is not None and owner.token == self._me.token:
                    self.path.unlink()
            self._me = None

    def _make(self) -> bool:
        """Whether the lock is now ours: false where there is one."""
        assert self._me is not None
        content = json.dumps(asdict(self._me), indent=1).encode() + b"\n"
        aside = aside_of(self.path)
        try:
            write_through(aside, content)
            os.link(aside, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _owner(self) -> Owner | None:
        """Whom the lock names; None where there is none."""
        return _read(self.path)

    def _refuse_if_alive(self, owner: Owner) -> None:
        assert self._me is not None
        lives = owner.is_here and owner.lives_here
        was_copied = owner.folder not in (0, self._me.folder)  # with the folder; or inodes are other ones at each look
        alive = lives
        if (was_copied and lives) or not owner.is_here:
            self._say(f"{self.path} names {owner}: waiting up to {SILENCE_SECONDS:.0f} s for a sign of its life")
            alive = self._gives_sign_of_life()
        if alive:
            raise UserError(
                f"training.output_dir={self.path.parent} is in use by {owner}; stop that job, or name another folder"
            )
        gone = "trains in the folder that this is a copy of" if lives else "has ended"
        self._say(f"{self.path} was left by {owner}, which {gone}; the folder is taken over")

    def _gives_sign_of_life(self) -> bool:
        first, deadline = self._touched(), time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENCE_SECONDS / 10))
            if self._touched() != first:
                return self.path.exists()  # else it was given back
        return False

    def _touched(self) -> int:
        """When the lock was last touched, as its file system counts; opened, so that NFS asks its server."""
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return -1

    def _remove(self, dead: Owner) -> None:
        """Remove a dead owner's lock, but not that of another who was quicker to do so."""
        aside = aside_of(self.path)
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        found = _read(aside)
        if found is not None and found.token != dead.token:
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            me = self._me
            with contextlib.suppress(OSError):
                owner = self._owner()
                if me is not None and owner is not None and owner.token == me.token:
                    os.utime(self.path)


def _read(path: Path) -> Owner | None:
    """A lock's owner. A lock that cannot be understood, torn by a crash, has an owner that is nowhere."""
    try:
        return Owner(**parse_json(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Owner("unknown", "", 0, "", "unknown", "unknown", "")


def _machine() -> str:
    """What tells kernels, and containers of one, apart."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(pid: int) -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return ""
