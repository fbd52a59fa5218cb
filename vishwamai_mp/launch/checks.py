"""What a check of `preflight` says, and the checks of a machine that need neither GPU nor torch."""

import contextlib
import os
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vishwamai_mp.config import UserError

_DISK_BYTES, _CHUNK = 128 << 20, 8 << 20
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    `passed`, a `fault` that training would meet, or `does not apply`: there is nothing here to check. `says` is one
    line for a person, `measured` the figures in it.
    """

    check: str
    state: Literal["passed", "fault", "does not apply"]
    says: str
    measured: dict[str, Any] = field(default_factory=dict)


def judge(check: str, faults: list[str], fine: str, **measured: Any) -> list[Finding]:
    """A fault per line of `faults`; without any, that the check has passed."""
    if faults:
        return [Finding(check, "fault", fault, measured) for fault in faults]
    return [Finding(check, "passed", fine, measured)]


def check_port(port: int) -> list[Finding]:
    """That a process here could listen on `port`, as machine 0 must for the rendezvous."""
    faults = []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OverflowError:
            faults = [f"port {port} is none: they are below 65536"]
        except OSError as error:
            faults = [f"port {port} cannot be listened on ({error.strerror}); choose another MASTER_PORT"]
    return judge("port", faults, f"port {port} is free", port=port)


def check_files(least: int) -> list[Finding]:
    """The limit of open files: a data loader and a collective's sockets take thousands on a large job."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    faults = [] if unlimited or soft >= least else [f"{soft} open files allowed, {least} wanted; ulimit -n {least}"]
    return judge("open files", faults, f"{'unlimited' if unlimited else soft} open files", soft=soft, hard=hard)


def check_shared_memory(least_gb: float, path: Path = Path("/dev/shm")) -> list[Finding]:
    """Room in shared memory, where NCCL and the data loader's workers put what processes exchange."""
    if not path.is_dir():
        return [Finding("shared memory", "does not apply", f"there is no {path}")]
    free = shutil.disk_usage(path).free / _GB
    mend = "in a container: a larger /dev/shm (docker --shm-size, Kubernetes emptyDir with medium Memory)"
    faults = [] if free >= least_gb else [f"{free:.2f} GB free in {path}, {least_gb:g} GB wanted; {mend}"]
    return judge("shared memory", faults, f"{free:.1f} GB free in {path}", free_gb=round(free, 3))


def check_disk(folder: Path, least_mb_s: float) -> list[Finding]:
    """How fast `folder`, where checkpoints go, takes 128 MiB, fsync included.

    Folders that are missing are made, as training would make them, and removed again.
    """
    path = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    chunk = os.urandom(_CHUNK)  # file systems may compress
    try:
        with _made(folder), _removed_at_the_end(path), path.open("wb", buffering=0) as file:
            begin = time.perf_counter()
            for _ in range(_DISK_BYTES // _CHUNK):
                file.write(chunk)
            os.fsync(file.fileno())
            seconds = time.perf_counter() - begin
    except OSError as error:
        why = f"{folder} cannot be written ({error.strerror}); checkpoints would go there"
        return [Finding("disk", "fault", why)]
    speed = _DISK_BYTES / 1e6 / seconds
    faults = [] if speed >= least_mb_s else [f"{folder} takes {speed:.0f} MB/s, {least_mb_s:g} MB/s wanted"]
    return judge("disk", faults, f"{folder} takes {speed:.0f} MB/s", mb_per_second=round(speed, 1))


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:  # the deepest first; another machine's check, or a job, may be using it by now
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def positive(name: str, value: float) -> None:
    """Refuse a limit that nothing could break."""
    if not value > 0:
        raise UserError(f"{name}={value:g}: use a number above 0")
