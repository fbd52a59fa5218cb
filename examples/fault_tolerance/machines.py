"""Machines in one: network namespaces with names, addresses and links of their own, for drills of jobs on several.

Needs Linux, root and iproute2. Everything that is made is taken away at the end: namespaces and the bridge.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
NETWORK, HOME = "10.77.0", "10.77.0.254"  # HOME is this machine's own address among them
_BRIDGE = "vmpbr0"


def why_not() -> str | None:
    """Why machines cannot be made here; None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if any(shutil.which(program) is None for program in ("ip", "nsenter", "unshare")):
        return "there is no ip, nsenter or unshare; install iproute2 and util-linux"
    probe = f"vmp-probe-{os.getpid()}"
    if _call("ip", "netns", "add", probe, check=False):
        return "network namespaces cannot be made here"
    _call("ip", "netns", "del", probe)
    return None


class Machine:
    """One of them. `name` resolves to `address` on all."""

    def __init__(self, number: int, hosts: Path) -> None:
        self.hosts = hosts
        self.name, self.address = f"n{number}", f"{NETWORK}.{number}"
        self.namespace, self.link = f"vmp-n{number}", f"vmpveth{number}"

    def command(self, *command: str) -> list[str]:
        """What runs `command` on this machine."""
        # Not `ip netns exec`, which hides /sys/fs/cgroup.
        named = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        inside = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount"]
        return [*inside, "sh", "-c", named, self.name, str(self.hosts), *command]

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on this machine, however it was started: all that is in its network namespace."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.path.samefile(f"/proc/{process.pid}/ns/net", f"/run/netns/{self.namespace}"):
                    found.append(process)
        return found

    def kill(self) -> None:
        """Kill all of them, as a loss of power does."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def cut(self) -> None:
        """Unplug it from the switch: packets vanish both ways, and neither side is told."""
        _call("ip", "link", "set", self.link, "nomaster")

    def restore(self) -> None:
        """Undo `cut`."""
        _call("ip", "link", "set", self.link, "master", _BRIDGE)


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """`count` machines on one switch. Their names are always the same, so a second call waits for the first to end.

    SIGTERM unplugs them as well; what a killed program left plugged in is unplugged first.
    """
    with (Path(tempfile.gettempdir()) / "vishwamai-machines.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            with _plugged_in(count) as every:
                yield every
        finally:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _plugged_in(count: int) -> Iterator[list[Machine]]:
    descriptor, hosts = tempfile.mkstemp(prefix="hosts-")
    every = [Machine(number, Path(hosts)) for number in range(1, count + 1)]
    names = "".join(f"{machine.address} {machine.name}\n" for machine in every)
    os.write(descriptor, f"127.0.0.1 localhost\n{names}".encode())
    os.close(descriptor)
    try:
        _unplug(every)
        _call("ip", "link", "add", _BRIDGE, "type", "bridge")
        _call("ip", "addr", "add", f"{HOME}/24", "dev", _BRIDGE)
        _call("ip", "link", "set", _BRIDGE, "up")
        for machine in every:
            _plug_in(machine)
        yield every
    finally:
        _unplug(every)
        Path(hosts).unlink()


def _unplug(every: Sequence[Machine]) -> None:
    for machine in every:
        _call("ip", "netns", "del", machine.namespace, check=False)
        _call("ip", "link", "del", machine.link, check=False)
    _call("ip", "link", "del", _BRIDGE, check=False)


def _plug_in(machine: Machine) -> None:
    inside = ["ip", "-n", machine.namespace]
    _call("ip", "netns", "add", machine.namespace)
    _call("ip", "link", "add", machine.link, "type", "veth", "peer", "name", "eth0", "netns", machine.namespace)
    _call("ip", "link", "set", machine.link, "master", _BRIDGE, "up")
    _call(*inside, "addr", "add", f"{machine.address}/24", "dev", "eth0")
    _call(*inside, "link", "set", "eth0", "up")
    _call(*inside, "link", "set", "lo", "up")


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 600) -> float:
    """Seconds until `condition` held; TimeoutError with `what` where it does not."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.25)
    return time.monotonic() - begin


def end(process: subprocess.Popen) -> None:
    """Kill a process that was started in a session of its own, with all that is in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _call(*command: str, check: bool = True) -> int:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.returncode
